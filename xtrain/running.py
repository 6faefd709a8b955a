"""One run of a Trainer, from set-up to clean-up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from xtrain.callbacks.base import Callback
from xtrain.configure import read_optimizers
from xtrain.data import LightningDataModule, make_transfer
from xtrain.errors import BackendUnavailableError, ConfigurationError, explain
from xtrain.hooks import collect_hooks
from xtrain.module import LightningModule
from xtrain.optimizer import GradientLife, wrap_optimizers
from xtrain.rules import Situation, check_rules

if TYPE_CHECKING:
    from xtrain.trainer import Trainer


@contextmanager
def running(
    trainer: Trainer, stage: str, module: LightningModule, datamodule: LightningDataModule | None
) -> Iterator[None]:
    """Set everything up for `stage` (fit, validate, test or predict), and clean up whatever happens.

    Raises:
        BackendUnavailableError: if the backend cannot run on this machine.
        UnsupportedCombinationError: with every violated rule.
        ConfigurationError: if `module` is no LightningModule, or returns nonsense.
    """
    _check_module(module)
    backend = trainer.backend
    reason = type(backend).available()
    if reason is not None:
        raise BackendUnavailableError(f"Backend '{backend.name}' cannot run here: {reason}.")
    backend.launch()
    trainer.stage, trainer.datamodule, trainer.module = stage, datamodule, module
    trainer.should_stop = False
    trainer.hooks = collect_hooks(trainer, module, trainer.callbacks, Callback)
    trainer.life = GradientLife(backend, trainer.hooks, trainer.nonfinite_loss)
    trainer.metrics.loggers = trainer.loggers if trainer.is_global_zero else []
    module.trainer, module._life = trainer, trainer.life
    guards: list[Any] = []
    try:
        _set_up_data(trainer, stage, datamodule)
        trainer.call("setup", stage)
        backend.setup_module(module)
        if stage == "fit":
            _set_up_optimizers(trainer, module)
            guards = trainer.life.guard()
        trainer.transfer = make_transfer(backend, datamodule, module)
        yield
    except BaseException as error:
        trainer.call("on_exception", error)
        raise
    finally:
        for guard in guards:
            guard.remove()
        trainer.life.toggles.clear()
        trainer.call("teardown", stage)
        if datamodule is not None:
            datamodule.teardown(stage)
        for logger in trainer.loggers:
            logger.save()
        module._life, trainer.stage = None, None
        backend.teardown()


def _set_up_data(trainer: Trainer, stage: str, datamodule: LightningDataModule | None) -> None:
    if datamodule is None:
        return
    datamodule.trainer = trainer
    if trainer.is_global_zero:
        datamodule.prepare_data()
    trainer.backend.collectives.barrier()
    datamodule.setup(stage)


def _set_up_optimizers(trainer: Trainer, module: LightningModule) -> None:
    optimizers, trainer.lr_scheduler_configs = read_optimizers(module.configure_optimizers())
    check_rules(
        Situation(
            backend=trainer.backend,
            precision=trainer.precision,
            optimizers=optimizers,
            automatic=module.automatic_optimization,
            accumulate_grad_batches=trainer.accumulate_grad_batches,
            gradient_clip_val=trainer.gradient_clip_val,
            gradient_clip_algorithm=trainer.gradient_clip_algorithm,
            scaler_kwargs=trainer.backend.scaler_kwargs,
            devices=trainer.backend.devices,
        )
    )
    wrap_optimizers(optimizers, trainer.life)
    wrapped = trainer.life.optimizers
    module._optimizers = wrapped[0] if len(wrapped) == 1 else wrapped
    trainer.backend.setup_optimizers(module, wrapped)


def _check_module(module: Any) -> None:
    if not isinstance(module, LightningModule):
        fix = "class Model(xtrain.LightningModule): ..."
        raise ConfigurationError(explain("a LightningModule", f"{type(module).__name__}", fix))
    if "_modules" not in vars(module):
        fix = "def __init__(self): super().__init__(); ..."
        raise ConfigurationError(explain(f"{type(module).__name__} to call super().__init__()", "it did not", fix))
