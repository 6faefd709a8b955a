"""What a fit reads: its loaders, epoch by epoch, also from the middle of one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from xtrain.checkpoint.generators import read_generators
from xtrain.clock import Interval
from xtrain.collectives import Collectives
from xtrain.data.batches import size_of, with_last
from xtrain.data.position import Remembering, own_generators, starting_at, stateful
from xtrain.data.sharding import agreed, repeat_last, set_epoch


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
        val_time: time between validations, where that decides.
        sanity_batches: validation batches per loader before training.
        ranks: the processes that read together.
        uneven: see ``Trainer(uneven_batches=...)``.
        again: asks for the loaders again.
        drawn_with: the random generators when the order of the epoch was drawn: the global ones, the loader's.
        remembering: what knows where a loader was that is read ahead, and the random generators.
    """

    loader: Any = None
    val_loaders: list[Any] = field(default_factory=list)
    batches: int | None = None
    sized: bool = False
    max_epochs: int | None = None
    steps_left: float = math.inf
    val_every: int | None = None
    val_time: Interval | None = None
    sanity_batches: int | float | None = 0
    ranks: Collectives = field(default_factory=Collectives)
    uneven: str = "drop"
    again: Callable[[], FitPlan] | None = None
    drawn_with: tuple[Any, Any] | None = None
    remembering: Remembering | None = None

    def epoch(self, number: int, resumption: Any = None, done: int = 0) -> Iterator[tuple[Any, bool]]:
        """Yield ``(batch, is_last)`` for the epoch `number`, equally often on every rank.

        Args:
            number: of the epoch, from 0.
            resumption: of a run that goes on in the middle of the epoch.
            done: batches that were seen in that case.
        """
        limit = self.steps_left if self.batches is None else min(self.batches - done, self.steps_left)
        count = None if limit == math.inf else int(limit)
        self.drawn_with = read_generators(), own_generators(self.loader)
        if self.loader is None:
            if resumption is not None:
                resumption.ready()
            return with_last(itertools.repeat(None), count, sized=True)
        set_epoch(self.loader, number)
        batches = self._from(done, resumption)
        if self.ranks.world_size > 1:
            if not self.sized:
                return agreed(itertools.islice(batches, count), self.ranks, self.uneven)
            return with_last(repeat_last(batches, len(self.loader) - done), count, sized=True)
        return with_last(batches, count, self.sized)

    def _from(self, done: int, resumption: Any) -> Iterable[Any]:
        """Return the loader's batches after the first `done`."""
        batches: Iterable[Any] = self.loader
        if resumption is not None:
            if resumption.load_position():
                batches = starting_at(iter(batches), 0, resumption.ready)
            else:
                size = size_of(self.loader) if self.uneven == "finish" else None  # its last batch will be repeated
                batches = starting_at(batches, done if size is None else min(done, size - 1), resumption.ready)
        if self.sized:
            self.remembering = None
            return batches
        read = None if resumption is None else resumption.read_ahead
        self.remembering = Remembering(batches, stateful(self.loader), read)
        return self.remembering
