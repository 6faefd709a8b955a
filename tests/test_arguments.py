"""Arguments of Lightning's Trainer: taken, mapped, or refused all at once with what xtrain has instead."""

from __future__ import annotations

import inspect
from datetime import timedelta

import pytest
import torch
from small import Small, loader, says, trained, trainer
from torch import Tensor

from xtrain import ConfigurationError, ProtocolError, Trainer
from xtrain.compat.arguments import ARGUMENTS
from xtrain.compat.backends import read_backend
from xtrain.compat.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy
from xtrain.run.options import OptionArguments

# Signature of Lightning 2.6: every argument with its default.
DEFAULTS = {
    "accelerator": "auto", "strategy": "auto", "devices": "auto", "num_nodes": 1, "precision": None, "logger": None,
    "callbacks": None, "fast_dev_run": False, "max_epochs": None, "min_epochs": None, "max_steps": -1,
    "min_steps": None, "max_time": None, "limit_train_batches": None, "limit_val_batches": None,
    "limit_test_batches": None, "limit_predict_batches": None, "overfit_batches": 0.0, "val_check_interval": None,
    "check_val_every_n_epoch": 1, "num_sanity_val_steps": None, "log_every_n_steps": None,
    "enable_checkpointing": None, "enable_progress_bar": None, "enable_model_summary": None,
    "accumulate_grad_batches": 1, "gradient_clip_val": None, "gradient_clip_algorithm": None, "deterministic": None,
    "benchmark": None, "inference_mode": True, "use_distributed_sampler": True, "profiler": None,
    "detect_anomaly": False, "barebones": False, "plugins": None, "sync_batchnorm": False,
    "reload_dataloaders_every_n_epochs": 0, "default_root_dir": None, "enable_autolog_hparams": True,
    "model_registry": None,
}  # fmt: skip


def test_every_default_of_lightning_at_once():
    run = Trainer(**DEFAULTS)
    assert run.log_every_n_steps == 50
    assert run.num_sanity_val_steps == 2


@pytest.mark.parametrize("name", DEFAULTS)
def test_each_argument_is_known(name):
    own = {*inspect.signature(Trainer).parameters, *OptionArguments.__annotations__}
    assert (name in own) != (name in ARGUMENTS)


def test_the_table_holds_no_argument_that_the_trainer_has():
    """Whoever gives the Trainer one of these arguments takes it out of the table."""
    assert not ARGUMENTS.keys() & inspect.signature(Trainer).parameters.keys()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_would_change_something_is_refused(name):
    try:
        trainer(**{name: "something"})
    except ConfigurationError as error:
        says(error, name, ARGUMENTS[name].instead)
    else:
        pytest.fail(f"{name} was taken")


def test_all_are_refused_at_once():
    with pytest.raises(ConfigurationError) as caught:
        trainer(**dict.fromkeys(ARGUMENTS, "something"), max_epoch=3)
    text = str(caught.value)
    assert [name for name in ARGUMENTS if f"{name}='something'" not in text] == []
    assert "max_epoch=3 out; did you mean max_epochs?" in text


@pytest.mark.parametrize(
    ("devices", "expected"),
    [("auto", None), (None, None), (1, 1), ("1", 1), ([0], 1), ("0,", 1), ((0,), 1)],
)
def test_devices(devices, expected):
    assert trainer(devices=devices).backend.devices == expected


@pytest.mark.parametrize("devices", [[1, 3], "1,3", [], "all", -1, "-1", [0, 2]])
def test_other_devices_than_the_first(devices):
    with pytest.raises(ConfigurationError) as caught:
        trainer(devices=devices)
    says(caught.value, "devices", repr(devices))


def test_a_whole_number_of_batches_may_be_a_float():
    assert trained(limit_train_batches=2.0)[0].seen == [0, 1]
    assert trained(limit_train_batches=0.5)[0].seen == [0, 1]


@pytest.mark.parametrize(
    ("strategy", "accelerator", "expected"),
    [
        (DDPStrategy(find_unused_parameters=True, static_graph=False), "cpu", ("cpu", {})),
        (DDPStrategy(timeout=timedelta(minutes=2)), "cpu", ("cpu", {"timeout": 120.0})),
        (SingleDeviceStrategy(device="cpu"), "cpu", ("cpu", {})),
        (DeepSpeedStrategy(stage=3, offload_optimizer=True, offload_parameters=False), None,
         ("deepspeed", {"stage": 3, "offload_optimizer": "cpu"})),
        (DeepSpeedStrategy(zero_optimization=False), "gpu", ("deepspeed", {"stage": 0})),
        (FSDPStrategy(cpu_offload=True), "gpu", ("fsdp", {"offload": "cpu"})),
    ],
)  # fmt: skip
def test_strategy_as_an_object(strategy, accelerator, expected):
    assert read_backend(None, accelerator, strategy) == expected


def test_an_argument_of_a_strategy_that_would_be_lost():
    with pytest.raises(ConfigurationError) as caught:
        DeepSpeedStrategy(allgather_bucket_size=5)
    says(caught.value, "allgather_bucket_size", "backend_options")


def test_strategy_of_a_trainer():
    class Asking(Small):
        def training_step(self, batch, batch_idx):
            strategy = self.trainer.strategy
            assert not isinstance(strategy, DDPStrategy)
            assert isinstance(strategy, SingleDeviceStrategy)
            assert strategy.root_device == torch.device("cpu")
            assert (strategy.global_rank, strategy.world_size, strategy.is_global_zero) == (0, 1, True)
            assert strategy.broadcast("x") == "x"
            assert strategy.reduce(Tensor([3.0]), reduce_op="SUM").item() == 3.0
            assert strategy.model is self
            strategy.barrier("here")
            self.seen.append(type(self.trainer.accelerator).__name__)

    assert trained(loader(1), Asking())[0].seen == ["CPUAccelerator"]


def test_a_strategy_made_by_hand_runs_nothing():
    with pytest.raises(ProtocolError) as caught:
        DDPStrategy().barrier()
    says(caught.value, "self.trainer.strategy")


def test_every_device_is_a_number_that_torch_knows():
    with pytest.raises(ConfigurationError) as caught:
        trainer(devices=-1)
    says(caught.value, "devices=torch.accelerator.device_count()")


def test_settings_are_read_as_from_lightnings():
    run = trainer(min_epochs=2, min_steps=3, overfit_batches=4)
    assert (run.min_epochs, run.min_steps, run.overfit_batches, run.barebones) == (2, 3, 4, False)


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook"])
def test_how_lightning_forks_is_what_the_launcher_does(strategy):
    assert trainer(accelerator="cpu", strategy=strategy).backend.name == "cpu"
