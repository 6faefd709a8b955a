"""Where in an epoch the data is: a loader that begins later, and loaders and datasets that know it themselves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from xtrain.checkpoint.generators import read_generators
from xtrain.data.batches import END
from xtrain.data.combined import TogetherLoader
from xtrain.data.sharding import rebuilt
from xtrain.errors import CheckpointError, ConfigurationError, explain

Notify = Callable[[], None]


def starting_at(loader: Any, batches: int, notify: Notify) -> Iterable[Any]:
    """Return the rest of an epoch of `loader`, whose epoch has been set.

    A `DataLoader` over a map-style dataset skips indices and loads nothing for them. Anything else is read from its
    beginning, and what was seen is dropped.

    Args:
        loader: what an epoch iterates over.
        batches: how many were seen.
        notify: called when the order is drawn and nothing that follows has been loaded.
    """
    begin = getattr(loader, "starting_at", None)
    if begin is not None:
        return begin(batches, notify)  # type: ignore[no-any-return]
    if isinstance(loader, TogetherLoader) and loader.combined.mode == "min_size":
        parts = loader.combined.flattened
        if all(map(_indexed, parts)):
            return TogetherLoader(loader.combined.mapped(lambda part: starting_at(part, batches, notify)))
    if _indexed(loader):
        own: Any = loader
        try:
            if own.batch_sampler is None:
                return rebuilt(own, batch_size=None, sampler=_Later(own.sampler, batches, notify))  # type: ignore[no-any-return]
            return rebuilt(own, batch_sampler=_Later(own.batch_sampler, batches, notify))  # type: ignore[no-any-return]
        except ConfigurationError:  # a class of its own, with other arguments
            pass
    return _replayed(loader, batches, notify)


def _indexed(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


class _Later:
    """A sampler, or batch sampler, without its first items."""

    def __init__(self, sampler: Any, skipped: int, notify: Notify) -> None:
        self._sampler, self._skipped, self._notify = sampler, skipped, notify

    def __len__(self) -> int:
        return max(0, len(self._sampler) - self._skipped)

    def __iter__(self) -> Iterator[Any]:
        items = itertools.islice(iter(self._sampler), self._skipped, None)
        first = next(items, END)  # draws the order
        self._notify()
        if first is not END:
            yield first
            yield from items


def _replayed(loader: Iterable[Any], batches: int, notify: Notify) -> Iterator[Any]:
    source = iter(loader)
    for _ in itertools.islice(source, batches):
        pass
    notify()
    yield from source


def samples_per_batch(loader: Any) -> int | None:
    """Return how many samples of the dataset one batch of a rank has; None if the loader does not say."""
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def batches_done(position: dict[str, Any], loader: Any, world_size: int) -> int:
    """Return how many batches of an epoch `loader` has to skip, where a run with other ranks or batches left off.

    Args:
        position: ``batches``, ``samples_per_batch`` (or None) and ``world_size`` when it was saved.
        loader: of this run.
        world_size: of this run.

    Raises:
        CheckpointError: if the samples seen are no whole number of batches here.
    """
    batches, size, here = int(position["batches"]), position["samples_per_batch"], samples_per_batch(loader)
    ranks = int(position["world_size"])
    if size is None or here is None:
        return batches
    samples, together = batches * int(size) * ranks, here * world_size
    if samples % together:
        received = f"{samples} samples seen in this epoch, and batches of {together} ({world_size} x {here})"
        fix = f"a batch size that divides {samples}, or a checkpoint from the end of an epoch"
        raise CheckpointError(explain("a whole number of batches to skip", received, fix))
    return samples // together


# -------------------------------------------------------------------- those that know it themselves


def stateful(loader: Any) -> Any:
    """Return the loader, or its dataset in this process, that keeps its own position; None if neither does."""
    if _keeps_state(loader):
        return loader
    dataset = getattr(loader, "dataset", None)
    iterable = isinstance(dataset, IterableDataset) and getattr(loader, "num_workers", 0) == 0
    return dataset if iterable and _keeps_state(dataset) else None


def _keeps_state(item: Any) -> bool:
    return callable(getattr(item, "state_dict", None)) and callable(getattr(item, "load_state_dict", None))


class Remembering:
    """A loader that is read one batch ahead: remembers where it was before that, and the random generators.

    Args:
        loader: what is iterated over.
        source: what has the state; None if nothing has.
        read: called when the first batch has been read.

    Attributes:
        state: of `source`.
        generators: as `xtrain.checkpoint.generators.read_generators` gives them.
    """

    def __init__(self, loader: Any, source: Any, read: Notify | None = None) -> None:
        self._loader, self._source, self._read = loader, source, read
        self.state: Any = None
        self.generators: Any = None

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            if self._read is not None:
                self._read()
                self._read = None
            yield batch
            self.state = None if self._source is None else self._source.state_dict()
            self.generators = read_generators()


def is_read_by_workers(loader: Any) -> bool:
    """Return whether processes of their own read items that a run may skip: their random numbers are not skipped."""
    parts = loader.combined.flattened if isinstance(loader, TogetherLoader) else [loader]
    return any(_indexed(part) and part.num_workers > 0 and not _keeps_state(part) for part in parts)


def is_used_up(loader: Any) -> bool:
    """Return whether `loader` is an iterator: nobody can read it from its beginning again."""
    return hasattr(loader, "__next__")


# -------------------------------------------------------------------- generators of samplers


def own_generators(loader: Any) -> dict[str, torch.Tensor]:
    """Return the states of the random generators that `loader` and its samplers were given."""
    return {place: generator.get_state() for place, generator in _generators(loader)}


def restore_own_generators(loader: Any, states: dict[str, torch.Tensor]) -> None:
    """Set them to what `own_generators` returned."""
    for place, generator in _generators(loader):
        if place in states:
            generator.set_state(states[place])


def _generators(loader: Any) -> Iterator[tuple[str, torch.Generator]]:
    batches = getattr(loader, "batch_sampler", None)
    parts = {"loader": loader, "sampler": getattr(loader, "sampler", None), "batches": batches}
    parts["inner"] = getattr(batches, "sampler", None)
    for place, part in parts.items():
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator):
            yield place, generator
