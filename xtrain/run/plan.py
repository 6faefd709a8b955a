"""How long a fit goes on and what it reads, worked out before the first batch."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from xtrain.collectives import Collectives
from xtrain.data.combined import as_loaders, combined
from xtrain.data.loaders import (
    check_loader,
    empty_loader,
    find_loader,
    limited,
    nothing_left,
    size_of,
    with_last,
)
from xtrain.data.sharding import agreed, common_size, repeat_last, set_epoch, shard_loader
from xtrain.errors import ConfigurationError, explain
from xtrain.hooks import is_overridden
from xtrain.module import LightningModule

if TYPE_CHECKING:
    from xtrain.trainer import Trainer


@dataclass
class FitPlan:
    """The loaders of a fit and its ends.

    Attributes:
        loader: training batches; None stands for batches that are None.
        val_loaders: validation batches.
        batches: training batches per epoch; None if the loader does not know.
        sized: whether every rank's loader knows its length.
        max_epochs: where to stop; None is unlimited.
        steps_left: training steps this call may still make.
        val_every: training batches between validations; None validates after the last batch of an epoch.
        sanity_batches: validation batches per loader before training.
        ranks: the processes that read together.
        uneven: see ``Trainer(uneven_batches=...)``.
    """

    loader: Any = None
    val_loaders: list[Any] = field(default_factory=list)
    batches: int | None = None
    sized: bool = False
    max_epochs: int | None = None
    steps_left: float = math.inf
    val_every: int | None = None
    sanity_batches: int | None = 0
    ranks: Collectives = field(default_factory=Collectives)
    uneven: str = "drop"

    def epoch(self, number: int) -> Iterator[tuple[Any, bool]]:
        """Yield ``(batch, is_last)`` for the epoch `number`, equally often on every rank."""
        limit = self.steps_left if self.batches is None else min(self.batches, self.steps_left)
        count = None if limit == math.inf else int(limit)
        if self.loader is None:
            return with_last(itertools.repeat(None), count, sized=True)
        set_epoch(self.loader, number)
        if self.ranks.world_size > 1:
            if not self.sized:
                return agreed(itertools.islice(self.loader, count), self.ranks, self.uneven)
            return with_last(repeat_last(self.loader), count, sized=True)
        return with_last(self.loader, count, self.sized)


def plan_fit(trainer: Trainer, train: Any, val: Any, steps: int | None) -> FitPlan:
    """Find the loaders and check the limits of `trainer` against them.

    Args:
        trainer: gives limits, DataModule and module.
        train: what ``fit`` was given as training loader.
        val: what it was given as validation loaders.
        steps: what it was given as number of training steps.

    Raises:
        ConfigurationError: for an empty loader, a limit that does not fit it, or no end in sight.
    """
    loader = combined(find_loader("train_dataloader", train, trainer.datamodule, trainer.module))
    if loader is None and steps is None and trainer.max_steps < 0 and trainer.limit_train_batches is None:
        fix = "trainer.fit(model, steps=1000) or Trainer(max_steps=1000)"
        raise ConfigurationError(explain("a training loader, or a number of steps without one", "neither", fix))
    ranks = trainer.backend.collectives
    loader = loader if loader is None else shard_loader(check_loader(loader, "training"), ranks)
    size = steps if loader is None else common_size(size_of(loader), ranks, trainer.uneven_batches)
    batches = limited(size, trainer.limit_train_batches, "limit_train_batches")
    if size == 0:
        raise empty_loader("training")
    if size and batches == 0 and trainer.limit_train_batches != 0:
        raise nothing_left("limit_train_batches", trainer.limit_train_batches, size)
    loader = loader if loader is None else trainer.backend.training_batches(loader)
    max_epochs: int | None = trainer.max_epochs
    if max_epochs is None and trainer.max_steps < 0 and steps is None:
        max_epochs = 1000
    _warn_if_done(trainer, max_epochs)
    val_loaders = _validation_loaders(trainer, val)
    sanity = limited(None, trainer.num_sanity_val_steps, "num_sanity_val_steps")
    if isinstance(trainer.limit_val_batches, int) and sanity is not None:
        sanity = min(sanity, trainer.limit_val_batches)
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
        sanity_batches=trainer.limit_val_batches if trainer.num_sanity_val_steps == -1 else sanity,
    )


def _warn_if_done(trainer: Trainer, max_epochs: int | None) -> None:
    """Say that an earlier fit has used up the limits, instead of training nothing without a word."""
    done = [f"max_epochs={max_epochs}"] if max_epochs and 0 < max_epochs <= trainer.current_epoch else []
    done += [f"max_steps={trainer.max_steps}"] if 0 < trainer.max_steps <= trainer.global_step else []
    if done:
        fix = "a new Trainer, or larger limits: trainer.max_epochs += 1"
        warnings.warn(explain("epochs and steps left to train", f"{' and '.join(done)}, reached", fix), stacklevel=2)


def _validation_loaders(trainer: Trainer, val: Any) -> list[Any]:
    if trainer.limit_val_batches == 0:
        return []
    found = as_loaders(find_loader("val_dataloader", val, trainer.datamodule, trainer.module))
    if found and not is_overridden("validation_step", trainer.module, LightningModule):
        warnings.warn("There are validation loaders, but no validation_step: nothing is validated.", stacklevel=2)
        return []
    for loader in found:
        if size_of(check_loader(loader, "validation")) == 0:
            raise empty_loader("validation")
    return [shard_loader(loader, trainer.backend.collectives) for loader in found]


def _validation_interval(trainer: Trainer, batches: int | None) -> int | None:
    every: int | float | None = trainer.val_check_interval
    if every is None or (isinstance(every, float) and every == 1.0):
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
