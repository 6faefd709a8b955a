"""One run of a Trainer, from set-up to clean-up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from xtrain.callbacks.base import Callback
from xtrain.configure import check_monitors, read_optimizers
from xtrain.contract import Situation
from xtrain.data.loaders import LightningDataModule, make_transfer
from xtrain.errors import BackendUnavailableError, ConfigurationError, explain
from xtrain.hooks import collect_hooks
from xtrain.launch.join import together
from xtrain.module import LightningModule
from xtrain.optimizer import GradientLife
from xtrain.rules import check_rules

if TYPE_CHECKING:
    from xtrain.trainer import Trainer


@contextmanager
def running(
    trainer: Trainer,
    stage: str,
    module: LightningModule,
    datamodule: LightningDataModule | None,
    plan: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Set everything up for `stage` (fit, validate, test or predict), and clean up whatever happens.

    Args:
        trainer: whose run it is.
        stage: as above.
        module: the user's module.
        datamodule: the user's DataModule, if any.
        plan: finds the loaders; called between the ``setup`` hooks and ``configure_optimizers``.

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
    with together(), ExitStack() as clean_up:  # every callback runs, in reverse order, even if another one raises
        backend.launch()
        clean_up.callback(backend.teardown)
        _attach(trainer, stage, module, datamodule)
        clean_up.callback(_detach, trainer, module)
        clean_up.callback(trainer.call, "teardown", stage)
        if datamodule is not None:
            clean_up.callback(datamodule.teardown, stage)
        try:
            _set_up(trainer, stage, module, datamodule, plan)
            clean_up.callback(trainer.life.toggles.clear)
            for guard in trainer.life.guard():
                clean_up.callback(guard.remove)
            clean_up.enter_context(backend.random_stream())
            yield
        except BaseException as error:
            for logger in trainer.metrics.loggers:
                logger.finalize("failed")
            trainer.call("on_exception", error)
            raise
        for logger in trainer.metrics.loggers:
            logger.finalize("success")


def _attach(trainer: Trainer, stage: str, module: LightningModule, datamodule: LightningDataModule | None) -> None:
    trainer.stage, trainer.datamodule, trainer.module = stage, datamodule, module
    trainer.should_stop = False
    trainer.lr_scheduler_configs = []
    for callback in trainer.callbacks:
        callback._metrics = trainer.metrics
    trainer.hooks = collect_hooks(trainer, module, trainer.callbacks, Callback)
    trainer.life = GradientLife(trainer.backend, trainer.hooks, trainer.nonfinite_loss)
    trainer.metrics.loggers = trainer.loggers if trainer.is_global_zero else []
    for logger in trainer.loggers:
        logger.enabled = trainer.is_global_zero
    module.trainer, module._life = trainer, trainer.life


def _detach(trainer: Trainer, module: LightningModule) -> None:
    module._life, trainer.stage = None, None
    for callback in trainer.callbacks:
        callback._metrics = None


def _set_up(
    trainer: Trainer,
    stage: str,
    module: LightningModule,
    datamodule: LightningDataModule | None,
    plan: Callable[[], None],
) -> None:
    if trainer.is_global_zero:
        module.prepare_data()
    _set_up_data(trainer, stage, datamodule)
    trainer.call("setup", stage)
    module.configure_model()
    for logger in trainer.metrics.loggers if module.hparams and module._log_hparams else ():
        logger.log_hyperparams(module.hparams)
    plan()
    trainer.backend.setup_module(module)
    if stage == "fit":
        _set_up_optimizers(trainer, module)
    trainer.transfer = make_transfer(trainer.backend, datamodule, module)


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
    if module.automatic_optimization:
        check_monitors(trainer.lr_scheduler_configs)
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
    trainer.life.wrap(optimizers)
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
