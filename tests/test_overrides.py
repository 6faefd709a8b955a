"""What modules and callbacks define under names of Lightning: called, refused or told. Objects of Lightning itself."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import torch
from small import Small, loader, says, trained, trainer

from xtrain import ConfigurationError, Trainer
from xtrain.callbacks import Callback, EarlyStopping, LambdaCallback


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("training_epoch_end", "on_train_epoch_end"),
        ("configure_sharded_model", "configure_model"),
        ("on_train_dataloader", "train_dataloader"),
        ("get_progress_bar_dict", "log"),
    ],
)
def test_hooks_of_other_versions_are_told(name, instead):
    module = type("Old", (Small,), {name: lambda self, *_: None})()
    with pytest.warns(UserWarning, match=rf"Old\.{name}: nobody calls them[^$]*def {instead}\(self"):
        trained(module=module)


def test_hooks_of_older_callbacks_are_told():
    class Old(Callback):
        def on_keyboard_interrupt(self, trainer, module): ...

    with pytest.warns(UserWarning, match=r"Old\.on_keyboard_interrupt[^$]*def on_exception"):
        trained(callbacks=[Old()])


def test_a_step_that_takes_the_iterator_is_refused():
    class Iterating(Small):
        def training_step(self, dataloader_iter): ...

    with pytest.raises(ConfigurationError) as caught:
        trained(module=Iterating())
    says(caught.value, "dataloader_iter", "def training_step(self, batch, batch_idx)")


def test_callbacks_of_a_module():
    calls = []

    class Own(Small):
        def configure_callbacks(self):
            return [EarlyStopping("mine"), LambdaCallback(on_train_start=lambda *_: calls.append("module"))]

        def on_train_epoch_end(self):
            self.log("mine", 1.0)

    other = LambdaCallback(on_train_start=lambda *_: calls.append("trainer"))
    stopping = EarlyStopping("theirs")
    run = trainer(callbacks=[stopping, other], enable_model_summary=False)
    run.fit(Own(), loader(1))
    assert calls == ["module"]
    assert [type(c) for c in run.callbacks] == [EarlyStopping, LambdaCallback]
    assert run.callbacks[0].monitor == "mine"
    run.max_epochs += 1
    run.fit(Own(), loader(1))
    assert len(run.callbacks) == 2  # a second run replaces them again


@pytest.mark.parametrize("returned", [3, ["early"]])
def test_callbacks_of_a_module_that_are_none(returned):
    module = Small()
    module.configure_callbacks = lambda: returned
    with pytest.raises(ConfigurationError) as caught:
        trained(module=module)
    says(caught.value, "callbacks derived from xtrain.Callback", type(returned if returned == 3 else "").__name__)


@pytest.mark.parametrize(
    ("precision", "inside", "outside"), [("bf16-mixed", "bf16", "32"), ("16-mixed", "16", "bf"), (32, "32-true", "16")]
)
def test_precision_is_text(precision, inside, outside):
    policy = Trainer("cpu", precision=precision).precision
    assert inside in policy
    assert outside not in policy
    assert policy == policy.name == f"{policy}"
    again = pickle.loads(pickle.dumps(policy))
    assert (again, again.autocast_dtype) == (policy, policy.autocast_dtype)


def lightnings(name, module):
    """A class as Lightning's would look: only its name and the name of its module matter."""
    return type(name, (), {"__module__": module})


def test_objects_of_lightning_get_the_import_line():
    module = lightnings("LightningModule", "lightning.pytorch.core.module")
    with pytest.raises(ConfigurationError) as caught:
        trained(module=type("Mine", (module,), {})())
    says(caught.value, "from xtrain import LightningModule")
    with pytest.raises(ConfigurationError) as caught:
        trainer(callbacks=[lightnings("EarlyStopping", "pytorch_lightning.callbacks.early_stopping")()])
    says(caught.value, "from xtrain.callbacks import EarlyStopping")
    with pytest.raises(ConfigurationError) as caught:
        trainer(strategy=lightnings("DDPStrategy", "lightning.pytorch.strategies.ddp")())
    says(caught.value, "from xtrain.strategies import DDPStrategy")
    with pytest.raises(ConfigurationError) as caught:
        trainer().fit(Small(), datamodule=lightnings("LightningDataModule", "lightning.pytorch.core.datamodule")())
    says(caught.value, "from xtrain import LightningDataModule")


def test_a_logger_that_has_the_methods_of_one():
    rows = []
    own = SimpleNamespace(
        log_metrics=lambda metrics, step: rows.append((step, metrics["loss"])),
        log_hyperparams=rows.append,
        save=lambda: None,
        finalize=lambda status: rows.append(status),
    )

    class Logging(Small):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.log("loss", 2.0)

    trained(loader(1), Logging(), logger=own, log_every_n_steps=1)
    assert rows == [(0, 2.0), "success"]


def test_freeze_and_unfreeze():
    module = Small()
    module.freeze()
    assert not any(p.requires_grad for p in module.parameters())
    assert not module.net.training
    module.unfreeze()
    assert all(p.requires_grad for p in module.parameters())
    assert module.net.training


@pytest.mark.parametrize("name", ["to_onnx", "to_torchscript", "to_tensorrt"])
def test_exports_say_what_exports(name):
    with pytest.raises(ConfigurationError) as caught:
        getattr(Small(), name)("model")
    says(caught.value, name)


def test_initial_hyperparameters():
    class Saving(Small):
        def __init__(self, lr=0.1):
            super().__init__()
            self.save_hyperparameters()

    module = Saving()
    module.hparams.lr = 0.5
    assert (module.hparams.lr, module.hparams_initial.lr) == (0.5, 0.1)


def test_printed_results_and_predictions_that_are_not_kept(capsys):
    class Evaluating(Small):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("test", 2.0)

        def predict_step(self, batch, batch_idx):
            self.seen.append(batch_idx)
            return torch.zeros(1)

    run, module = trainer(), Evaluating()
    run.test(module, loader(1), verbose=False)
    assert capsys.readouterr().out == ""
    run.test(module, [loader(1), loader(1)], verbose=True)
    assert capsys.readouterr().out.splitlines() == [
        "loader 0: test/dataloader_idx_0=2",
        "loader 1: test/dataloader_idx_1=2",
    ]
    assert run.predict(module, loader(2), return_predictions=False) is None
    assert len(run.predict(module, loader(2), return_predictions=None)) == 2
    assert module.seen == [0, 1, 0, 1]
