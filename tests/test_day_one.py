"""What a script written for Lightning does that few do: small arguments, attributes, and the module of most reports."""

from __future__ import annotations

import copy
import inspect
from collections import UserDict, UserList
from importlib import import_module

import pytest
import torch

import xtrain
from tests.small import Automatic, Small, loader, rows
from xtrain import Callback, ConfigurationError, LightningModule, ModelCheckpoint, Trainer
from xtrain.callbacks import EarlyStopping, LearningRateMonitor, RichProgressBar, TQDMProgressBar
from xtrain.callbacks.early_stopping import EarlyStoppingReason
from xtrain.demos.boring_classes import BoringDataModule, BoringModel, ManualOptimBoringModel
from xtrain.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

QUIET = {"backend": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


class Validated(Automatic):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))


@pytest.mark.parametrize(
    ("saver", "run", "steps"),
    [
        ({}, {"val_check_interval": 0.5}, [2, 4, 6, 8]),
        ({"save_on_train_epoch_end": True}, {"val_check_interval": 0.5}, [4, 8]),
        ({"save_on_train_epoch_end": False}, {}, [4, 8]),
        ({}, {"check_val_every_n_epoch": 2}, [8]),
        ({"every_n_epochs": 2}, {"val_check_interval": 0.5}, [6, 8]),
        ({"every_n_train_steps": 2, "every_n_epochs": 1}, {"val_check_interval": 0.5}, [2, 4, 6, 8]),
    ],
)
def test_checkpoints_are_saved_after_validations_or_epochs(tmp_path, saver, run, steps):
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **saver)
    Trainer(max_epochs=2, callbacks=saving, log_every_n_steps=1, **run, **QUIET).fit(Validated(), loader(4), loader(1))
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [f"step={step}.ckpt" for step in steps]


@pytest.mark.parametrize(("monitor", "mode", "kept"), [("epoch", "max", 4), ("step", "min", 2)])
def test_the_newest_or_oldest_checkpoint_may_be_asked_for_by_epoch_or_step(tmp_path, monitor, mode, kept):
    saving = ModelCheckpoint(tmp_path, filename="{step}", monitor=monitor, mode=mode)
    Trainer(max_epochs=2, callbacks=saving, log_every_n_steps=1, **QUIET).fit(Automatic(), loader(2))
    assert [path.name for path in tmp_path.glob("*.ckpt")] == [f"step={kept}.ckpt"]
    assert saving.best_model_path == str(tmp_path / f"step={kept}.ckpt")


def test_evaluations_take_a_checkpoint_where_lightning_has_it(tmp_path, capsys):
    trained, fresh = Validated(), Validated(seed=1)
    trainer = Trainer(max_epochs=1, log_every_n_steps=1, **QUIET)
    trainer.fit(trained, loader(2))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    capsys.readouterr()
    (result,) = trainer.validate(fresh, loader(1), tmp_path / "a.ckpt", True, weights_only=True)
    assert result["val_loss"] == pytest.approx(trained.loss(rows(2)).item())
    assert capsys.readouterr().out == f"val_loss={result['val_loss']:.6g}\n"
    trainer.validate(fresh, loader(1))
    assert capsys.readouterr().out == ""
    watched = Trainer(backend="cpu", enable_model_summary=False)
    watched.validate(fresh, loader(1))
    assert "val_loss=" in capsys.readouterr().out


@pytest.mark.parametrize("module", [BoringModel, ManualOptimBoringModel])
def test_the_module_of_most_reports_runs(module):
    torch.manual_seed(0)
    trainer, boring = Trainer(max_epochs=1, log_every_n_steps=10, **QUIET), module()
    before = boring.layer.weight.clone()
    trainer.fit(boring, datamodule=BoringDataModule())
    assert trainer.global_step == 64
    assert not torch.equal(before, boring.layer.weight)
    assert len(trainer.predict(boring)) == 64
    assert xtrain.demos.BoringModel is BoringModel
    with pytest.raises(ConfigurationError, match=r"derived from xtrain\.LightningModule"):
        import_module("xtrain.demos.mnist_datamodule").MNISTDataModule()


class Settings(UserDict):
    """Items are attributes, as in the configuration objects of OmegaConf."""

    def __getattr__(self, name):
        if name.startswith("__") or name == "data":
            raise AttributeError(name)
        return self.data[name]


class Configured(Small):
    def __init__(self, config):
        super().__init__()
        self.save_hyperparameters(config)
        self.width = config.net.width


def test_a_configuration_object_is_kept_and_comes_back_from_a_checkpoint(tmp_path):
    config = Settings(lr=0.1, net=Settings(width=3))
    module = Configured(config)
    assert module.hparams is config
    module.hparams["lr"] = 0.5
    assert (module.hparams_initial.lr, module.hparams.lr) == (0.1, 0.5)
    trainer = Trainer(max_epochs=1, log_every_n_steps=1, **QUIET)
    trainer.fit(module, loader(1))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Configured.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (loaded.hparams, loaded.width) == ({"lr": 0.5, "net": {"width": 3}}, 3)


def test_modules_are_no_hyperparameters():
    class Wrapping(LightningModule):
        def __init__(self, net, lr=0.1):
            super().__init__()
            self.save_hyperparameters()

    with pytest.warns(UserWarning, match="net, a module.*\n.*ignore='net'"):
        assert list(Wrapping(torch.nn.Linear(1, 1)).hparams) == ["net", "lr"]


class Grouped(Automatic):
    names = ("w", "b")

    def configure_optimizers(self):
        pairs = zip(self.names, self.net.parameters(), strict=True)
        return torch.optim.SGD([{"params": [p], "name": name} for name, p in pairs], lr=0.5, momentum=0.9)


def test_rates_have_the_names_of_groups_and_are_kept(tmp_path):
    monitor = LearningRateMonitor("step", log_momentum=True)
    settings = {"max_epochs": 1, "log_every_n_steps": 2, "logger": CSVLogger(tmp_path), "callbacks": monitor, **QUIET}
    Trainer(**settings).fit(Grouped(), loader(5))
    assert monitor.lrs == {"lr-SGD/w": [0.5] * 3, "lr-SGD/b": [0.5] * 3}
    assert monitor.last_momentum_values == {"lr-SGD/w-momentum": 0.9, "lr-SGD/b-momentum": 0.9}
    twins = Grouped()
    twins.names = ("w", "w")
    with pytest.raises(ConfigurationError, match="w twice"):
        Trainer(**settings).fit(twins, loader(2))


class Ends(Callback):
    def __init__(self):
        self.outputs = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.outputs.append(outputs)


def test_a_batch_of_none_has_no_outputs():
    ends = Ends()
    with pytest.warns(UserWarning, match="None, which trains nothing"):
        Trainer(max_epochs=1, log_every_n_steps=1, callbacks=ends, **QUIET).fit(Small(), [rows(2), None])
    assert ends.outputs == [{}, None]


def test_a_hook_that_ends_an_epoch_makes_its_batch_the_last():
    class Ending(Small):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 1 else None

    trainer = Trainer(max_epochs=2, log_every_n_steps=1, **QUIET)
    trainer.fit(Ending(), loader(4))
    assert (trainer.is_last_batch, trainer.global_step, trainer.current_epoch) == (True, 2, 2)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stopping_threshold": 1e9}, EarlyStoppingReason.STOPPING_THRESHOLD),
        ({"divergence_threshold": -1.0}, EarlyStoppingReason.DIVERGENCE_THRESHOLD),
        ({"min_delta": 1e9, "patience": 1}, EarlyStoppingReason.PATIENCE_EXHAUSTED),
        ({}, EarlyStoppingReason.NOT_STOPPED),
    ],
)
def test_early_stopping_says_why_as_a_value(options, reason):
    stopping = EarlyStopping("val_loss", **options)
    Trainer(max_epochs=2, log_every_n_steps=1, callbacks=stopping, **QUIET).fit(Validated(), loader(1), loader(1))
    assert stopping.stopping_reason is reason
    assert (stopping.stopping_reason_message is None) == (reason is EarlyStoppingReason.NOT_STOPPED)


def test_bars_of_tqdm_may_be_replaced(capsys):
    from tqdm import tqdm

    class Changed(TQDMProgressBar):
        def init_train_tqdm(self):
            bar = super().init_train_tqdm()
            bar.unit = "steps"
            return bar

        def init_validation_tqdm(self):
            return tqdm(disable=True)

    bar = Changed(refresh_rate=1, leave=True, refresh_seconds=0.0)
    assert bar.trainer is None
    assert (bar.refresh_rate, bar.is_enabled, bar.is_disabled) == (1, True, False)
    options = {"max_epochs": 1, "log_every_n_steps": 1, "enable_model_summary": False, "backend": "cpu"}
    trainer = Trainer(callbacks=bar, **options)
    trainer.fit(Validated(), loader(3), loader(2))
    assert bar.trainer is trainer
    assert copy.copy(bar).trainer is None  # a copy is free of the run
    shown = capsys.readouterr().err
    assert "Epoch 1/1: 3/3" in shown
    assert "Validation" not in shown


def test_rich_bars_have_a_theme(monkeypatch, capsys):
    theme = import_module("xtrain.callbacks.progress.rich_progress").RichProgressBarTheme
    chosen = theme(description="red", progress_bar_finished="green", metrics_format=".2e", metrics_text_delimiter=" / ")
    bar = RichProgressBar(theme=chosen, leave=True, console_kwargs={"force_terminal": True, "color_system": "standard"})
    monkeypatch.setenv("COLUMNS", "120")

    class Shown(Automatic):
        def training_step(self, batch, batch_idx):
            self.log_dict({"a": 1.5, "b": 2.0}, prog_bar=True)
            return super().training_step(batch, batch_idx)

    options = {"max_epochs": 1, "log_every_n_steps": 1, "enable_model_summary": False, "backend": "cpu"}
    Trainer(callbacks=bar, **options).fit(Shown(), loader(2))
    shown = capsys.readouterr().err
    assert "a=1.50e+00 / b=2.00e+00" in shown
    assert "\x1b[31mEpoch 1/1" in shown
    assert "\x1b[32m" in shown


def test_a_save_after_a_test_keeps_the_optimizers(tmp_path):
    class Adam(Validated):
        test_step = Validated.validation_step

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.1)

    whole, halved = Adam(), Adam()
    Trainer(max_epochs=2, log_every_n_steps=1, **QUIET).fit(whole, loader(3))
    first = Trainer(max_epochs=1, log_every_n_steps=1, **QUIET)
    first.fit(halved, loader(3))
    first.test(halved, loader(1))
    first.save_checkpoint(tmp_path / "a.ckpt")
    second = Adam(seed=1)
    Trainer(max_epochs=2, log_every_n_steps=1, **QUIET).fit(second, loader(3), ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(whole.net.weight, second.net.weight)


def test_a_checkpoint_of_the_same_name_is_replaced_where_they_are_not_counted(tmp_path):
    for counts in (True, False):
        saving = ModelCheckpoint(tmp_path / str(counts), "same", save_top_k=-1, enable_version_counter=counts)
        Trainer(max_epochs=2, log_every_n_steps=1, callbacks=saving, **QUIET).fit(Automatic(), loader(1))
    names = [sorted(path.name for path in tmp_path.glob(f"{counts}/*.ckpt")) for counts in (True, False)]
    assert names == [["same-v1.ckpt", "same.ckpt"], ["same.ckpt"]]


def test_loggers_take_arguments_of_lightning(tmp_path):
    board = TensorBoardLogger(tmp_path, default_hp_metric=False, sub_dir="events")
    board.log_metrics({"a": 1.0}, 0)
    board.finalize("success")
    assert len(list((tmp_path / "lightning_logs/version_0/events").glob("events.*"))) == 1
    with pytest.raises(ConfigurationError, match="add_graph"):
        TensorBoardLogger(tmp_path, log_graph=True)
    with pytest.raises(ConfigurationError, match="log_artifact"):
        MLFlowLogger(log_model=True)
    MLFlowLogger(save_dir=tmp_path, synchronous=True)
    WandbLogger(checkpoint_name="best")


def test_the_arguments_of_another_frame_are_kept():
    class Base(LightningModule):
        def keep(self, frame):
            self.save_hyperparameters(frame=frame)

    class Kept(Base):
        def __init__(self, lr=0.1):
            super().__init__()
            self.keep(inspect.currentframe())

    assert Kept(0.3).hparams == {"lr": 0.3}


def test_two_early_stoppings_keep_a_state_each(tmp_path):
    def stoppings():
        return [EarlyStopping("val_loss", patience=3), EarlyStopping("other", patience=5, strict=False)]

    trainer = Trainer(max_epochs=1, log_every_n_steps=1, callbacks=stoppings(), **QUIET)
    trainer.fit(Validated(), loader(1), loader(1))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    first, second = resumed = stoppings()
    Trainer(max_epochs=2, log_every_n_steps=1, callbacks=resumed, **QUIET).fit(
        Validated(), loader(1), loader(1), ckpt_path=tmp_path / "a.ckpt"
    )
    assert first.best_score < second.best_score == float("inf")
    assert (first.patience, second.patience) == (3, 5)


def test_the_state_of_a_callback_that_is_not_given_again_is_told(tmp_path):
    trainer = Trainer(max_epochs=1, callbacks=EarlyStopping("val_loss"), **QUIET)
    trainer.fit(Validated(), loader(1), loader(1))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match=r"none for the state of EarlyStopping.*\n.*callbacks=\[EarlyStopping\("):
        Trainer(max_epochs=2, **QUIET).fit(Validated(), loader(1), loader(1), ckpt_path=tmp_path / "a.ckpt")


def test_who_stops_the_training_before_its_minimum_says_that_it_goes_on(capsys):
    stop = EarlyStopping("val_loss", divergence_threshold=-1.0)
    trainer = Trainer(max_epochs=4, min_epochs=3, callbacks=stop, **QUIET)
    trainer.fit(Validated(), loader(1), loader(1))
    assert "EarlyStopping ends the training, not before min_epochs=3, in epoch 0:" in capsys.readouterr().out
    assert trainer.current_epoch == 3


def test_momentum_of_an_optimizer_without_one_is_told(tmp_path):
    class Plain(Automatic):
        def configure_optimizers(self):
            return torch.optim.Adagrad(self.parameters())

    monitor = LearningRateMonitor(log_momentum=True)
    trainer = Trainer(max_epochs=1, log_every_n_steps=2, logger=CSVLogger(tmp_path), callbacks=monitor, **QUIET)
    with pytest.warns(RuntimeWarning, match="optimizer with momentum"):
        trainer.fit(Plain(), loader(3))
    assert monitor.lrs == {"lr-Adagrad": [0.01, 0.01]}
    assert trainer.num_sanity_val_batches == []


def test_devices_are_known_before_a_run():
    asked = Trainer("cpu", devices=2)
    assert (asked.num_devices, asked.device_ids, asked.num_nodes) == (2, [0, 1], 1)
    assert (Trainer("cpu").num_devices, Trainer("cpu").num_nodes) == (1, 1)


def test_devices_may_be_any_sequence():
    assert Trainer("cpu", devices=UserList([0, 1])).num_devices == 2
