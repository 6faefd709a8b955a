"""One run of a Trainer, from set-up to clean-up; what it is made of is in `xtrain.run.state.Run`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from xtrain.callbacks.base import Callback, check_callbacks
from xtrain.configure import NamedOptimizers, ask_for_optimizers, check_monitors, fuse, names_of, read_optimizers
from xtrain.contract import Backend, Situation
from xtrain.data.datamodule import LightningDataModule, make_transfer
from xtrain.errors import BackendUnavailableError, ProtocolError, explain
from xtrain.hooks import collect_hooks, is_overridden
from xtrain.hparams import merged
from xtrain.launch.join import fail_as_one
from xtrain.life import GradientLife
from xtrain.metrics.log import MetricLog
from xtrain.metrics.objects import united
from xtrain.module import LightningModule
from xtrain.optimizer import LightningOptimizer
from xtrain.rules import check_rules
from xtrain.run import agreement
from xtrain.run.advice import advise, introduce
from xtrain.run.checks import check_idle, check_methods, odd_optimizers
from xtrain.run.state import FitPlan, Run, TrainerState
from xtrain.run.switches import in_effect
from xtrain.stages import TrainerFn

_LOG = logging.getLogger("xtrain")


@contextmanager
def started_run(
    trainer: TrainerState,
    stage: str,
    module: LightningModule,
    datamodule: LightningDataModule | None,
    plan: Callable[[Run], FitPlan] = lambda run: run.plan,
    resume: Callable[[Run], Any] = lambda run: None,
) -> Iterator[Run]:
    """Set a run up and yield it; clean up whatever happens.

    Args:
        trainer: whose run it is.
        stage: fit, validate, test or predict.
        module: the user's module.
        datamodule: the user's DataModule, if any.
        plan: finds loaders and ends of a fit; called between the ``setup`` hooks and ``configure_optimizers``.
        resume: finds and reads a checkpoint, and returns how the run goes on from it, or None.

    Raises:
        BackendUnavailableError: if the backend cannot run on this machine.
        UnsupportedCombinationError: with every violated rule.
        ConfigurationError: if `module` is no LightningModule, or returns nonsense.
        ProtocolError: if Trainer or module are in a run already.
    """
    check_idle(trainer, module)
    backend = trainer.backend
    if (reason := type(backend).available()) is not None:
        raise BackendUnavailableError(f"Backend '{backend.name}' cannot run here: {reason}.")
    with fail_as_one(), ExitStack() as clean_up:  # every callback runs, in reverse order, even if another one raises
        backend.launch()
        clean_up.enter_context(_ended_by_all(backend, stage))
        clean_up.callback(backend.teardown)
        run = _begin(trainer, stage, module, datamodule)
        clean_up.callback(_end, run)
        clean_up.callback(run.call, "teardown", run.called)
        if datamodule is not None:
            clean_up.callback(datamodule.teardown, run.called)
        try:
            run.resumption = resume(run)
            agreement.introduce(run)
            clean_up.enter_context(in_effect(run))
            _set_up(run, plan)
            clean_up.enter_context(united(run.module, backend.collectives))
            clean_up.callback(run.life.toggles.clear)
            for guard in run.life.guard():
                clean_up.callback(guard.remove)
            clean_up.enter_context(backend.random_stream())
            yield run
        except BaseException as error:
            run.failed = True
            try:
                run.call("on_exception", error)  # first: people save there what can be saved
                if datamodule is not None:
                    datamodule.on_exception(error)
            finally:
                _send_cut(run)
                _finalize_loggers(run, "failed")
            _explain_inference_tensors(error)
            raise
        _finalize_loggers(run, "success")


def _send_cut(run: Run) -> None:
    """Send the values that an error has kept from their log point; the error matters more than they do."""
    progress = run.trainer.progress
    inside = run.called == "fit" and progress.done <= progress.batch_idx  # of a training step
    try:
        run.metrics.send_cut(progress.logged_steps if inside else run.log_step, progress.epoch)
    except Exception:
        _LOG.exception("The values since the last log point are lost")


def _finalize_loggers(run: Run, status: str) -> None:
    """End every logger, also if another one fails; after a failed run that is told, but does not hide its error."""
    failures = []
    for logger in run.metrics.loggers:
        try:
            logger.finalize(status)
        except Exception as failure:
            failures.append(failure)
            _LOG.error("%s could not end its log", type(logger).__name__, exc_info=failure)
    if failures and status == "success":
        raise failures[0]


def _explain_inference_tensors(error: BaseException) -> None:
    """Say why torch refuses to train on a tensor that an evaluation made.

    Raises:
        ProtocolError: if that is what `error` says.
    """
    if isinstance(error, RuntimeError) and "nference tensor" in str(error):
        fix = "Trainer(inference_mode=False), or make that tensor in __init__ or configure_model"
        received = f"one kept from an evaluation: {error}"
        raise ProtocolError(explain("tensors that training may use", received, fix)) from error


def _begin(trainer: TrainerState, stage: str, module: LightningModule, datamodule: LightningDataModule | None) -> Run:
    """Make the run, and let Trainer and module know it."""
    backend = trainer.backend
    metrics = _metrics(trainer)
    trainer.callbacks = _configured(trainer.callbacks, module)
    for callback in trainer.callbacks:
        callback._metrics = metrics
    hooks = collect_hooks(trainer, module, trainer.callbacks, Callback, metrics.reduce_epoch)
    run = Run(
        trainer=trainer,
        called=TrainerFn(stage),
        stage=stage,
        module=module,
        datamodule=datamodule,
        hooks=hooks,
        life=GradientLife(backend, hooks, trainer.nonfinite_loss),
        metrics=metrics,
        transfer=make_transfer(backend, datamodule, module),
    )
    trainer.run, trainer.should_stop = run, False
    trainer.last_fit = run if stage == "fit" else trainer.last_fit
    run.life.override = module.backward if is_overridden("backward", module, LightningModule) else None
    run.life.counter = trainer.progress if trainer.step_counting == "optimizer" else None
    _attach(run)
    return run


def _configured(callbacks: list[Callback], module: LightningModule) -> list[Callback]:
    """Return the callbacks of the Trainer and the module; the module's replace those of the same class."""
    own = module.configure_callbacks()
    own = list(own) if isinstance(own, list | tuple) else [own]
    check_callbacks(own)
    kinds = {type(callback) for callback in own}
    return [*(callback for callback in callbacks if type(callback) not in kinds), *own]


def _attach(run: Run) -> None:
    for part in _lightning_modules(run.module):
        part.trainer, part._life = run.trainer, run.life  # type: ignore[assignment]  # a Trainer is all there is


def _lightning_modules(module: LightningModule) -> list[LightningModule]:
    """Return the module of a run and those inside it, which see the same Trainer and optimizers."""
    return [part for part in module.modules() if isinstance(part, LightningModule)]


def _metrics(trainer: TrainerState) -> MetricLog:
    """Return the collection of a run; only rank 0 writes."""
    backend, first = trainer.backend, trainer.backend.collectives.rank == 0
    log = MetricLog(
        backend.read_scalars,
        backend.collectives,
        trainer.log_every_n_steps,
        backend.capabilities.asynchronous,
    )
    log.loggers = trainer.loggers if first else []
    for logger in trainer.loggers:
        logger.enabled = first
    return log


@contextmanager
def _ended_by_all(backend: Backend, stage: str) -> Iterator[None]:
    """Return from a run that went well only when it did on every rank, clean-up included."""
    yield
    if backend.collectives.meets_in_steps:
        backend.collectives.meet(f"end {stage}")


def _end(run: Run) -> None:
    run.active = False
    for part in _lightning_modules(run.module):
        part._life = None
    for callback in run.trainer.callbacks:
        callback._metrics = None


def _set_up(run: Run, plan: Callable[[Run], FitPlan]) -> None:
    module = run.module
    check_methods(module, run.datamodule, run.trainer.callbacks)
    for logger in run.metrics.loggers:
        if hasattr(logger, "prepare"):  # those of other libraries have no such method
            logger.prepare()
    _prepare_data(run)
    if run.datamodule is not None:
        run.datamodule.setup(run.called)
    run.call("setup", run.called)
    module.configure_model()
    _attach(run)  # the layers that were just made, too
    if run.resumption is not None:
        run.resumption.load_module()
    owners = [owner for owner in (run.datamodule, module) if owner is not None and owner._log_hparams]
    kept = merged(owners)
    for logger in run.metrics.loggers if kept else ():
        logger.log_hyperparams(kept)
    run.backend.setup_module(module)  # before loaders are asked for: making them may use the module on its device
    run.plan = plan(run)
    if run.stage == "fit":
        _set_up_optimizers(run)
        if run.resumption is not None:
            run.resumption.load_optimizers()
        advise(run)
    introduce(run)


def _prepare_data(run: Run) -> None:
    """Let one process per host (or of all) download and write files, and everyone wait for it."""
    if run.datamodule is not None:
        run.datamodule.trainer = run.trainer
    first_of_host = run.backend.collectives.local_rank == 0
    for owner in (run.datamodule, run.module):
        if owner is not None and (run.trainer.is_global_zero or (owner.prepare_data_per_node and first_of_host)):
            owner.prepare_data()
    run.backend.collectives.barrier()


def _set_up_optimizers(run: Run) -> None:
    trainer, module = run.trainer, run.module
    returned = ask_for_optimizers(module.configure_optimizers)
    optimizers, run.schedulers = read_optimizers(returned)
    run.life.automatic = module.automatic_optimization
    if module.automatic_optimization:
        check_monitors(run.schedulers)
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
            fused=trainer.options.fused,
            compile=trainer.options.compile,
        )
    )
    if trainer.options.fused:
        fuse(optimizers)
    wrapped = run.life.optimizers
    names = names_of(returned)
    for index, optimizer in enumerate(optimizers):
        wrapped.append(LightningOptimizer(optimizer, run.life, names[index] if names else None))
    for part in _lightning_modules(module):
        part._optimizers = wrapped[0] if len(wrapped) == 1 and names is None else NamedOptimizers(wrapped)
    odd = list(odd_optimizers(module, optimizers))  # before engines put shards into the groups
    trainer.backend.setup_optimizers(module, wrapped)
    for text in odd:  # and after they may have refused them
        warnings.warn(text, stacklevel=2)
