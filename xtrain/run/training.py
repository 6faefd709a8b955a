"""The loop of a fit: read `train` and `_train_epoch` from top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xtrain.data.batches import empty_loader
from xtrain.errors import explain
from xtrain.run.agreement import end_epoch, meet, stops
from xtrain.run.automatic import AutomaticStep
from xtrain.run.batches import BATCH_OF_NONE, detached_outputs, unchanged_random_numbers
from xtrain.run.checks import IDLE_BATCHES, IdleWatch
from xtrain.run.evaluation import accept_arguments, evaluate
from xtrain.run.plan import reload_if_due
from xtrain.run.state import Run


def train(run: Run) -> None:
    """Train the module of `run` to the ends of its plan."""
    progress, plan, metrics = run.trainer.progress, run.plan, run.metrics
    training_step = accept_arguments(run.module.training_step, 2)
    automatic = AutomaticStep(run, training_step) if run.module.automatic_optimization else None
    step: Callable[[Any, int], Any] = automatic or training_step
    if run.resumption is None:
        progress.done = 0
    run.call("on_fit_start")
    if run.trainer.options.compile in ("step", "require"):
        step = _compiled(run, automatic, training_step)
    if run.resumption is None and plan.val_loaders and plan.sanity_batches != 0:
        with unchanged_random_numbers(run.backend):
            run.call("on_sanity_check_start")
            evaluate(run, "sanity", plan.val_loaders)
            run.call("on_sanity_check_end")
    run.watch = IdleWatch(run).look
    with metrics.stage("train"):
        run.call("on_train_start")
        run.begin()
        first = progress.epoch
        while not _finished(run) and not (plan.max_epochs is not None and progress.epoch >= plan.max_epochs):
            reload_if_due(run, progress.epoch - first)
            skipped = _train_epoch(run, step)
            if progress.batch_idx < 0:
                raise empty_loader("training")
            run.watch()
            cut = run.points is not None and _is_cut(run)
            if cut:
                run.points.reach("cut")
            metrics.reduce_epoch()
            run.call("on_train_epoch_end")
            metrics.send_epoch(run.log_step, progress.epoch)
            if automatic is not None:
                automatic.end_epoch(skipped)
            end_epoch(run)
            progress.epoch, progress.done = progress.epoch + 1, 0
            if run.points is not None and not cut:
                run.points.reach("epoch")
        _look_at(run, metrics.flush(run.log_step, max(progress.epoch - 1, 0)))
    run.call("on_train_end")
    run.call("on_fit_end")


def _compiled(run: Run, automatic: AutomaticStep | None, training_step: Callable[[Any, int], Any]) -> Any:
    """Return the training step, recorded and replayed compiled; of automatic optimization all but the schedules."""
    from xtrain.compiled.step import CompiledStep

    inner = training_step if automatic is None else automatic.train_on
    run.compiled_step = compiled = CompiledStep(run, inner, run.trainer.options.compile == "require")
    if automatic is None:
        return compiled
    automatic.train_on = compiled
    return automatic


def _train_epoch(run: Run, training_step: Callable[[Any, int], Any]) -> bool:
    """Train on the batches of one epoch; return whether a hook skipped the rest of it."""
    trainer, backend, metrics, life, plan = run.trainer, run.backend, run.metrics, run.life, run.plan
    at_start, at_end = run.hooks["on_train_batch_start"], run.hooks["on_train_batch_end"]
    progress, counted = trainer.progress, int(trainer.step_counting == "training")
    accumulates = trainer.accumulate_grad_batches > 1
    run.call("on_train_epoch_start")
    start, progress.ending = progress.done, 0
    progress.batch_idx, progress.first_batch, run.remark = start - 1, progress.batches - start, ""
    for index, (batch, last) in enumerate(run.epoch(), start):
        progress.batch_idx, progress.is_last_batch, outputs = index, last, None
        if batch is None and plan.loader is not None:
            life.warn_once(BATCH_OF_NONE)
            parts = 0
        else:
            parts = trainer.accumulate_grad_batches
            batch = run.transfer(batch, 0)
            metrics.set_batch(batch)
            if at_start and -1 in run.call("on_train_batch_start", batch, index):
                run.remark, progress.is_last_batch = ", which on_train_batch_start ended by -1", True
                return True
            metrics.hook("training_step")
            with backend.forward_context():
                outputs = training_step(batch, index)
            backend.step_boundary()
        if life.stepped:
            progress.global_step += counted
            life.stepped = False
        if at_end:
            progress.ending = 1
            run.call("on_train_batch_end", detached_outputs(outputs, parts), batch, index)
            progress.ending = 0
        if life.last_loss is not None:
            metrics.checks["loss"] = life.last_loss
        if not (accumulates and run.accumulating):
            _end_step(run)
        progress.batches, progress.done = progress.batches + 1, index + 1
        _validate_if_due(run)
        plan.steps_left -= 1
        if _ends_with(run, last):
            return False
    _end_early(run)
    return False


def _ends_with(run: Run, last: bool) -> bool:
    """Return whether the training ends with this batch; if not, and the epoch does neither, save what is due."""
    if _finished(run):
        return True
    if run.points is not None and not last:
        run.points.reach("batch")
    return False


def _is_cut(run: Run) -> bool:
    """Return whether the training ends inside of an epoch: who goes on from here reads the rest of it."""
    return run.trainer.progress.done > 0 and not run.trainer.progress.is_last_batch and _finished(run)


def _end_early(run: Run) -> None:
    """Validate, if it is time, after an epoch with fewer batches than the loader's length."""
    progress, plan = run.trainer.progress, run.plan
    if progress.batch_idx < 0 or progress.is_last_batch:
        return
    if run.resumption is not None and progress.done == plan.batches:  # what is left of the epoch is its end
        _end_with_validation(run)
        return
    received = f"{progress.batch_idx + 1}, and no more"
    fix = "__len__ that counts what __iter__ gives, or none at all"
    run.life.warn_once(explain(f"{plan.batches} batches, as len(loader) says", received, fix))
    _end_with_validation(run)


def _end_with_validation(run: Run) -> None:
    run.trainer.progress.is_last_batch = True
    _validate_if_due(run)


def _finished(run: Run) -> bool:
    trainer, plan = run.trainer, run.plan
    if trainer.progress.batch_idx == IDLE_BATCHES:
        run.watch()
    done = plan.steps_left <= 0 or 0 <= trainer.max_steps <= trainer.progress.global_step
    return done or _stopped(run) or plan.batches == 0


def _stopped(run: Run) -> bool:
    """Return whether somebody has stopped the training, and it has gone on for as long as it was to."""
    trainer, progress = run.trainer, run.trainer.progress
    return stops(run) and trainer.options.may_stop(progress.epoch, progress.global_step)


def _look_at(run: Run, checks: dict[str, float]) -> None:
    """Look at the loss of a log point, if looking earlier would have meant to wait for it."""
    if "loss" in checks:
        run.life.check_finite(checks["loss"])


def _end_step(run: Run) -> None:
    """Take in what a step has logged. At its log points ranks meet that would not before they talk without a header."""
    progress = run.trainer.progress
    _look_at(run, run.metrics.flush_step(progress.logged_steps, progress.epoch))
    progress.logged_steps += 1
    ranks = run.backend.collectives
    if run.metrics.at_log_point and (ranks.equal_forwards or not ranks.meets_in_steps):
        meet(run, "go on from a log point")


def _validate_if_due(run: Run) -> None:
    plan = run.plan
    if plan.val_loaders and _validation_due(run):
        evaluate(run, "validate", plan.val_loaders)
        if plan.val_time is not None:
            plan.val_time.restart()


def _validation_due(run: Run) -> bool:
    """Return whether validation follows the training batch that just ended."""
    trainer, progress, every = run.trainer, run.trainer.progress, run.plan.val_every
    epochs = trainer.check_val_every_n_epoch
    if epochs is not None and (progress.epoch + 1) % epochs:
        return False
    if _stopped(run):  # who stopped the training wants to know what it came to
        return True
    if run.plan.val_time is not None:
        return run.plan.val_time.is_over(run.backend)
    if epochs is None:  # batches are counted across epochs
        return progress.batches % (every or 1) == 0
    return progress.is_last_batch if every is None else (progress.batch_idx + 1) % every == 0
