"""The part of the data that one rank reads: of a dataset, of a sampler's order, of a stream."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import IterableDataset, Sampler, get_worker_info
from torch.utils.data._utils import worker as _torch_worker

from xtrain.collectives import Collectives
from xtrain.data.batches import END

_WORKER: Any = _torch_worker
_PIECE = 1024  # indices per rank that are drawn at once


def tell_epoch(part: Any, epoch: int) -> None:
    """Call ``part.set_epoch(epoch)`` if there is such a method."""
    if hasattr(part, "set_epoch"):
        part.set_epoch(epoch)


class EachOnce(Sampler[int]):
    """A contiguous part of a dataset: the parts in order of rank are the whole in its order, each sample once.

    Args:
        size: of the dataset.
        shuffle: take the parts of a random order, seeded by the epoch.
        ranks: the processes of the run.
        seed: of the random order.
    """

    def __init__(self, size: int, shuffle: bool, ranks: Collectives, seed: int) -> None:
        self.size, self.shuffle, self.seed, self.epoch = size, shuffle, seed, 0
        self.first = -(-size * ranks.rank // ranks.world_size)
        self.end = -(-size * (ranks.rank + 1) // ranks.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Seed the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.end - self.first

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(range(self.first, self.end))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(self.size, generator=generator)[self.first : self.end].tolist())


class PartOfSampler(Sampler[Any]):
    """This rank's part of the order in which rank 0's sampler, or batch sampler, visits the data.

    The order is drawn piece by piece, so the sampler may be endless. Every rank draws from its own sampler, which
    keeps generators in step that the ranks have in common; what it draws counts on rank 0 only.

    Args:
        sampler: any.
        ranks: the processes of the run.
        seed: with the epoch, of torch's generator while it draws.
        equal: give all ranks equally much, by repeating a few at the end.
    """

    def __init__(self, sampler: Any, ranks: Collectives, seed: int, equal: bool) -> None:
        self.sampler, self.ranks, self.seed, self.equal, self.epoch = sampler, ranks, seed, equal, 0

    def set_epoch(self, epoch: int) -> None:
        """Seed the order of the next iteration."""
        self.epoch = epoch
        tell_epoch(self.sampler, epoch)

    def __len__(self) -> int:
        rank, world = self.ranks.rank, self.ranks.world_size
        return (len(self.sampler) - (0 if self.equal else rank) + world - 1) // world

    def __iter__(self) -> Iterator[Any]:
        rank, world = self.ranks.rank, self.ranks.world_size
        first: list[Any] = []
        rest = 0
        for piece in self._pieces():
            first = first or piece[:world]
            rest = len(piece) % world
            yield from piece[rank::world]
        if self.equal and 0 < rest <= rank:
            yield first[(rank - rest) % len(first)]

    def _pieces(self) -> Iterator[list[Any]]:
        """Yield the order in pieces that divide by the number of ranks, but for the last."""
        size, source = _PIECE * self.ranks.world_size, iter(self.sampler)
        state = torch.Generator().manual_seed(self.seed + self.epoch).get_state()
        piece: list[Any] = []
        while True:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(state)
                piece = list(itertools.islice(source, size))
                state = torch.get_rng_state()
            piece = self.ranks.broadcast(piece)
            yield piece
            if len(piece) < size:
                return


class PartOfIterable(IterableDataset[Any]):
    """This rank's items of a stream, no matter how many loader workers read it.

    The dataset is told that there are as many workers as all ranks have together. One that asks for their number
    splits itself by it, as PyTorch's documentation shows; of any other every n-th item is taken.

    Args:
        dataset: the user's.
        rank: of this process.
        world_size: number of ranks.
    """

    def __init__(self, dataset: Any, rank: int, world_size: int) -> None:
        self.dataset, self.rank, self.world_size = dataset, rank, world_size

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on."""
        tell_epoch(self.dataset, epoch)

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        workers = info if isinstance(info, _AllWorkers) else _AllWorkers(info, self)
        with _told(workers):
            items = iter(self.dataset)
            item = next(items, END)
        every = workers.count
        own, every = (0, 1) if workers.asked else (workers.number, every)
        position = 0
        while item is not END:
            if position % every == own:
                yield item
            position += 1
            with _told(workers):
                item = next(items, END)


class WorkerStart:
    """Tells a loader worker how many there are on all ranks, then calls the user's ``worker_init_fn``.

    Args:
        user: that function, or None.
    """

    def __init__(self, user: Callable[[int], Any] | None) -> None:
        self._user = user

    def __call__(self, worker_id: int) -> None:
        """Do it, in the worker that has just started."""
        info: Any = get_worker_info()
        _WORKER._worker_info = _AllWorkers(info, info.dataset)
        if self._user is not None:
            self._user(worker_id)


class _AllWorkers:
    """What ``get_worker_info()`` returns to a dataset: this worker among those of all ranks.

    Attributes:
        asked: whether anybody wanted to know how many there are.
    """

    def __init__(self, info: Any, part: PartOfIterable) -> None:
        own, here = (0, 1) if info is None else (info.id, info.num_workers)
        self.number, self.count = own * part.world_size + part.rank, here * part.world_size
        self.id = self.number
        self.dataset = part.dataset
        self.seed: int = torch.initial_seed() if info is None else info.seed
        self.asked = False

    @property
    def num_workers(self) -> int:
        """The number of workers of all ranks together."""
        self.asked = True
        return self.count


@contextmanager
def _told(workers: _AllWorkers) -> Iterator[None]:
    """Let ``get_worker_info()`` return `workers` inside."""
    before, _WORKER._worker_info = _WORKER._worker_info, workers
    try:
        yield
    finally:
        _WORKER._worker_info = before


class RecordedBatches(Sampler[Any]):
    """The batches of a batch sampler, whose indices are kept in `seen`."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.seen: list[Any] = []

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on."""
        tell_epoch(self.batches, epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.seen.clear()
        for indices in self.batches:
            self.seen.append(list(indices))
            yield indices
