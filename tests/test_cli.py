"""A command line from the signature of a module: what it reads, makes, runs and writes beside the logs."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from small import Small, assert_equal, loader, says, trained

from xtrain import ConfigurationError, LightningDataModule, Trainer
from xtrain.callbacks import EarlyStopping, Timer
from xtrain.cli import LightningCLI
from xtrain.loggers import CSVLogger

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.backend", "cpu"]


class Model(Small):
    def __init__(self, lr: float = 0.5, width: int = 3, names: list[str] | None = None):
        super().__init__()
        self.save_hyperparameters()

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return batch_idx

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class Data(LightningDataModule):
    def __init__(self, batches: int = 4):
        self.batches = batches

    def train_dataloader(self):
        return loader(self.batches)

    val_dataloader = predict_dataloader = train_dataloader


def command(*words, **options):
    return LightningCLI(Model, Data, args=[words[0], *QUIET, *words[1:]], **options)


def test_fit_reads_module_data_and_trainer(tmp_path):
    words = ("--model.lr", "0.1", "--data.batches", "2", "--trainer.max_epochs", "2")
    cli = command("fit", *words, "--trainer.default_root_dir", str(tmp_path))
    assert_equal(cli.model.net, trained(loader(2), max_epochs=2)[0].net)
    assert cli.trainer.current_epoch == 2
    assert cli.model.hparams == {"lr": 0.1, "width": 3, "names": None}


def test_the_saved_configuration_repeats_the_run(tmp_path):
    words = ("--model.lr=0.1", "--model.names=[a, b]", "--trainer.max_epochs=1", "--trainer.logger=true")
    first = command("fit", *words, f"--trainer.default_root_dir={tmp_path}", "--seed_everything=7")
    saved = Path(first.trainer.logger.log_dir, "config.yaml")
    again = command("fit", "--config", str(saved), "--trainer.max_epochs=2")
    assert again.model.hparams == first.model.hparams == {"lr": 0.1, "width": 3, "names": ["a", "b"]}
    assert (again.trainer.current_epoch, again.config.fit.seed_everything) == (2, 7)


def test_classes_come_by_their_path(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        f"""
trainer:
  max_epochs: 1
  logger: {{class_path: xtrain.loggers.CSVLogger, init_args: {{save_dir: {tmp_path}, name: mine}}}}
  callbacks:
    - {{class_path: xtrain.callbacks.EarlyStopping, init_args: {{monitor: loss, patience: 9}}}}
"""
    )
    cli = command("fit", "--config", str(config))
    assert isinstance(cli.trainer.logger, CSVLogger)
    assert cli.trainer.logger.name == "mine"
    assert [c.patience for c in cli.trainer.callbacks if isinstance(c, EarlyStopping)] == [9]


def test_the_other_commands(tmp_path, capsys):
    root = f"--trainer.default_root_dir={tmp_path}"
    assert command("predict", root, "--data.batches=3").trainer.current_epoch == 0
    assert "loss" in command("validate", root).trainer.callback_metrics
    assert list(tmp_path.iterdir()) == []


def test_without_subcommands_nothing_runs():
    cli = LightningCLI(Model, args=[*QUIET, "--model.lr=0.2"], run=False, save_config_callback=None)
    assert (cli.model.hparams.lr, cli.trainer.current_epoch, cli.datamodule) == (0.2, 0, None)
    assert isinstance(cli.trainer, Trainer)
    defaults = LightningCLI(Model, args={}, run=False, trainer_defaults={"max_epochs": 5, "backend": "cpu"})
    assert defaults.trainer.max_epochs == 5


def test_any_class_of_a_kind(tmp_path):
    words = ["fit", *QUIET, "--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path}"]
    path = f"{Model.__module__}.Model"
    cli = LightningCLI(Small, Data, args=[*words, f"--model={path}", "--model.lr=0.3"], subclass_mode_model=True)
    assert cli.model.hparams.lr == 0.3


def test_links_and_options_of_ones_own():
    class Linked(LightningCLI):
        def add_arguments_to_parser(self, parser):
            parser.link_arguments("data.batches", "model.width")
            parser.add_argument("--note", default="")

    cli = Linked(Model, Data, args=[*QUIET, "--data.batches=7", "--note=hello"], run=False)
    assert (cli.model.hparams.width, cli.config.note) == (7, "hello")


def test_a_wrong_option_is_named(capsys):
    with pytest.raises(SystemExit):
        command("fit", "--model.lrr", "0.1")
    assert "--model.lrr" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command("fit", "--model.lr", "fast")
    assert "model.lr" in capsys.readouterr().err


def test_the_configuration_of_an_earlier_run_is_not_replaced(tmp_path):
    words = ("fit", "--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path}")
    command(*words)
    with pytest.raises(ConfigurationError) as caught:
        command(*words)
    says(caught.value, "config.yaml exists", "overwrite")
    command(*words, save_config_kwargs={"overwrite": True})


def test_jsonargparse_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(ImportError, match=r"pip install 'xtrain-torch\[cli\]'"):
        command("fit")


def test_optimizer_and_scheduler_come_from_the_line(tmp_path):
    words = ["--optimizer=Adam", "--optimizer.lr=0.25", "--lr_scheduler=StepLR", "--lr_scheduler.step_size=1"]
    words += ["--lr_scheduler.gamma=0.5", "--trainer.max_epochs=2", f"--trainer.default_root_dir={tmp_path}"]

    class Automatically(Model):
        def __init__(self, lr: float = 0.5):
            super().__init__(lr)
            self.automatic_optimization = True

        def training_step(self, batch, batch_idx):
            return self.loss(batch)

    cli = LightningCLI(Automatically, Data, args=["fit", *QUIET, *words])
    (optimizer,) = cli.trainer.optimizers
    assert (type(optimizer), optimizer.defaults["lr"]) == (torch.optim.Adam, 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.0625
    layer, data = Small().net, loader(4)
    by_hand = torch.optim.Adam(layer.parameters(), lr=0.25)
    for epoch in range(2):
        by_hand.param_groups[0]["lr"] = 0.25 * 0.5**epoch
        for batch in data:
            by_hand.zero_grad()
            layer(batch).pow(2).mean().backward()
            by_hand.step()
    assert_equal(cli.model.net, layer)
    again = LightningCLI(Automatically, Data, args=["fit", "--config", str(tmp_path / "config.yaml")], **OVERWRITE)
    assert_equal(again.model.net, layer)


OVERWRITE = {"save_config_kwargs": {"overwrite": True}}


def test_a_plateau_says_what_it_watches():
    path = "xtrain.cli.ReduceLROnPlateau"
    words = ["--optimizer=SGD", f"--lr_scheduler={path}", "--lr_scheduler.monitor=loss", "--lr_scheduler.patience=3"]
    cli = LightningCLI(Model, args=[*QUIET, *words], run=False)
    settings = cli.model.configure_optimizers()["lr_scheduler"]
    assert (settings["monitor"], settings["scheduler"].patience) == ("loss", 3)
    with pytest.raises(ConfigurationError) as caught:
        LightningCLI(Model, args=[*QUIET, "--lr_scheduler=StepLR", "--lr_scheduler.step_size=1"], run=False)
    says(caught.value, "--optimizer")


def test_times_and_other_types_of_the_trainer(tmp_path):
    words = ("--trainer.max_time=00:01:00:00", "--trainer.val_check_interval=00:00:00:30", "--trainer.max_epochs=1")
    cli = command("fit", *words, f"--trainer.default_root_dir={tmp_path}")
    assert cli.trainer.val_check_interval == timedelta(seconds=30)
    (timer,) = [c for c in cli.trainer.callbacks if isinstance(c, Timer)]
    assert 3000 < timer.time_remaining() < 3600
    assert (tmp_path / "config.yaml").exists()
