"""What a fit reads and how long it goes on, worked out before the first batch."""

from __future__ import annotations

import math
import warnings
from datetime import timedelta
from functools import partial
from typing import Any

from xtrain.clock import Interval
from xtrain.data.batches import empty_loader, limited, nothing_left, size_of
from xtrain.data.sharding import common_size
from xtrain.errors import ConfigurationError, explain
from xtrain.hooks import is_overridden
from xtrain.module import LightningModule
from xtrain.run.state import FitPlan, Run, TrainerState


def plan_fit(run: Run, train: Any, val: Any, steps: int | None) -> FitPlan:
    """Find the loaders of `run` and check the limits of its Trainer against them.

    Args:
        run: gives limits, DataModule and module.
        train: what ``fit`` was given as training loader.
        val: what it was given as validation loaders.
        steps: what it was given as number of training steps.

    Raises:
        ConfigurationError: for an empty loader, a limit that does not fit it, or no end in sight.
    """
    trainer, ranks = run.trainer, run.backend.collectives
    loader = next(iter(run.read_loaders("fit", train)), None)
    if loader is None and steps is None and trainer.max_steps < 0:
        fix = "trainer.fit(model, steps=1000) or Trainer(max_steps=1000)"
        raise ConfigurationError(explain("a training loader, or a number of steps without one", "neither", fix))
    size = steps if loader is None else common_size(size_of(loader), ranks, trainer.uneven_batches)
    batches = limited(size, trainer.limit_train_batches, "limit_train_batches")
    if size == 0:
        raise empty_loader("training")
    if size and batches == 0 and trainer.limit_train_batches != 0:
        raise nothing_left("limit_train_batches", trainer.limit_train_batches, size)
    loader = loader if loader is None else run.backend.training_batches(loader)
    max_epochs: int | None = trainer.max_epochs
    if max_epochs is None and trainer.max_steps < 0 and steps is None:
        max_epochs = 1000
    _warn_if_done(trainer, max_epochs)
    val_loaders, every = _validation_loaders(run, val), trainer.val_check_interval
    return FitPlan(
        ranks=ranks,
        uneven=trainer.uneven_batches,
        loader=loader,
        val_loaders=val_loaders,
        batches=batches,
        sized=size is not None and (loader is None or size_of(loader) is not None),
        max_epochs=None if max_epochs == -1 else max_epochs,
        steps_left=math.inf if steps is None else steps,
        val_every=_validation_interval(trainer, batches) if val_loaders else None,
        val_time=Interval(every.total_seconds()) if isinstance(every, timedelta) else None,
        sanity_batches=_sanity_batches(trainer),
        again=partial(plan_fit, run, train, val, steps),
    )


def reload_if_due(run: Run, epochs: int) -> None:
    """Ask for the loaders again, as ``reload_dataloaders_every_n_epochs`` says, after so many epochs of a fit."""
    every, old = run.trainer.options.reload_dataloaders_every_n_epochs, run.plan
    if every and epochs and epochs % every == 0 and old.again is not None:
        run.plan = old.again()
        run.plan.steps_left, run.plan.val_time = old.steps_left, old.val_time


def _warn_if_done(trainer: TrainerState, max_epochs: int | None) -> None:
    """Say that an earlier fit has used up the limits, instead of training nothing without a word."""
    done = [f"max_epochs={max_epochs}"] if max_epochs and 0 < max_epochs <= trainer.current_epoch else []
    done += [f"max_steps={trainer.max_steps}"] if 0 < trainer.max_steps <= trainer.global_step else []
    if done:
        fix = "a new Trainer, or larger limits: trainer.max_epochs += 1"
        warnings.warn(explain("epochs and steps left to train", f"{' and '.join(done)}, reached", fix), stacklevel=2)


def _validation_loaders(run: Run, val: Any) -> list[Any]:
    if run.trainer.limit_val_batches == 0:
        return []
    found = run.read_loaders("validate", val)
    if found and not is_overridden("validation_step", run.module, LightningModule):
        warnings.warn("There are validation loaders, but no validation_step: nothing is validated.", stacklevel=2)
        return []
    run.loaders["validate"] = found
    return found


def _sanity_batches(trainer: TrainerState) -> int | float | None:
    """Return how many batches of each validation loader are looked at before training; None means all."""
    limit, wanted = trainer.limit_val_batches, trainer.num_sanity_val_steps
    if wanted == -1:
        return limit
    return min(wanted, limit) if isinstance(limit, int) else wanted


def _validation_interval(trainer: TrainerState, batches: int | None) -> int | None:
    every = trainer.val_check_interval
    if every is None or isinstance(every, timedelta) or (isinstance(every, float) and every == 1.0):
        return None
    fix = "Trainer(val_check_interval=100) or Trainer(val_check_interval=0.25)"
    if isinstance(every, float):
        if batches is None:
            raise ConfigurationError(explain("a number of batches, since the loader has no length", every, fix))
        return max(1, int(every * batches))
    if batches is not None and every > batches and trainer.check_val_every_n_epoch is not None:
        expected = f"val_check_interval of at most the {batches} batches of an epoch"
        raise ConfigurationError(explain(expected, every, "Trainer(check_val_every_n_epoch=None) counts across epochs"))
    return every
