"""Each rank reads its part of the data, and all ranks make the same number of steps."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from xtrain.collectives import Collectives
from xtrain.data.batches import END
from xtrain.data.combined import CombinedLoader, TogetherLoader
from xtrain.data.parts import EachOnce, PartOfIterable, PartOfSampler, RecordedBatches, WorkerStart, tell_epoch
from xtrain.errors import ConfigurationError, explain

_COPIED = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
)


def shard_loader(loader: Any, ranks: Collectives, evaluation: bool = False) -> Any:
    """Return `loader` for this rank: a DataLoader reads its part, anything else is left alone.

    For training the parts of a map-style dataset are made by `torch.utils.data.DistributedSampler`: equally
    long (a few samples are repeated) and, if the loader shuffles, in an order seeded by the epoch. For an
    evaluation each sample is in one part, and the parts in order of rank are the whole. The order of a custom
    sampler is rank 0's, and is split. An `IterableDataset` that asks how many workers there are splits itself;
    any other is split item by item over ranks and workers, unless it says ``sharded = True``. A sampler that is
    distributed already stays. A loader that shuffles has the order of seed and epoch in a run of one process,
    too, unless it was given a generator: a run may go on with another number of processes.

    Args:
        loader: what the user gave; its ``batch_size`` is per rank.
        ranks: the processes of the run.
        evaluation: no gradients are averaged, so the parts may be unequal, where the forward allows it.

    Raises:
        ConfigurationError: if the loader is of a class that cannot be made anew.
    """
    if ranks.world_size > 1 and isinstance(loader, TogetherLoader):
        return TogetherLoader(loader.combined.mapped(lambda part: shard_loader(part, ranks, evaluation)))
    if ranks.world_size == 1:
        return loader if evaluation else _shuffled_by_epoch(loader)
    if not isinstance(loader, DataLoader):
        return loader
    if isinstance(loader.dataset, IterableDataset):
        if getattr(loader.dataset, "sharded", False):
            return loader
        items = PartOfIterable(loader.dataset, ranks.rank, ranks.world_size)
        start = WorkerStart(loader.worker_init_fn)
        size = loader.batch_size
        return rebuilt(loader, dataset=items, worker_init_fn=start, batch_size=size, drop_last=loader.drop_last)
    batches: Any = loader.batch_sampler
    if any(hasattr(s, "num_replicas") for s in (loader.sampler, batches, getattr(batches, "sampler", None))):
        return loader
    equal = not evaluation or ranks.equal_forwards
    if batches is None:
        return rebuilt(loader, batch_size=None, sampler=_part_of(loader.sampler, loader.dataset, ranks, equal))
    if type(batches) is BatchSampler:
        part = _part_of(batches.sampler, loader.dataset, ranks, equal)
        return rebuilt(loader, sampler=part, batch_size=batches.batch_size, drop_last=batches.drop_last)
    return rebuilt(loader, batch_sampler=_part_of(batches, None, ranks, equal))  # whole batches go to ranks


def _shuffled_by_epoch(loader: Any) -> Any:
    batches: Any = loader.batch_sampler if isinstance(loader, DataLoader) else None
    sampler: Any = getattr(batches, "sampler", None)
    plain = type(batches) is BatchSampler and type(sampler) is RandomSampler and sampler.generator is None
    if not plain or sampler.replacement or len(sampler) != len(loader.dataset):
        return loader
    # Without a seed it is the one that torch's generator began with: a new one each time.
    seed = int(os.environ.get("XTRAIN_SEED", torch.initial_seed() % 2**62))
    part = PartOfOrder(loader.dataset, 1, 0, shuffle=True, seed=seed)
    try:
        return rebuilt(loader, sampler=part, batch_size=batches.batch_size, drop_last=batches.drop_last)
    except ConfigurationError:  # a class of its own: it shuffles as it likes
        return loader


class PartOfOrder(DistributedSampler[Any]):
    """This rank's part of the order that seed and epoch give, in which a run with other ranks may go on."""


_DRAWN = (PartOfOrder, PartOfSampler)


def _part_of(sampler: Any, dataset: Any, ranks: Collectives, equal: bool) -> Any:
    seed = int(os.environ.get("XTRAIN_SEED", "0"))
    shuffle = type(sampler) is RandomSampler
    every_sample_once = type(sampler) is SequentialSampler or (shuffle and not sampler.replacement)
    if not every_sample_once or len(sampler) != len(dataset):
        return PartOfSampler(sampler, ranks, seed, equal)
    if equal:
        return PartOfOrder(dataset, ranks.world_size, ranks.rank, shuffle=shuffle, seed=seed)
    return EachOnce(len(dataset), shuffle, ranks, seed)


def rebuilt(loader: DataLoader[Any], **changed: Any) -> Any:
    """Return a loader of the same class with other arguments.

    Raises:
        ConfigurationError: if its class does not take `DataLoader`'s arguments.
    """
    settings = {name: getattr(loader, name) for name in _COPIED}
    if loader.num_workers == 0:
        del settings["prefetch_factor"], settings["multiprocessing_context"]
    try:
        return type(loader)(**{"dataset": loader.dataset, **settings, **changed})
    except TypeError as error:
        name = type(loader).__name__
        fix = f"{name}(..., sampler=torch.utils.data.DistributedSampler(dataset))"
        raise ConfigurationError(explain(f"{name} to take DataLoader's arguments", str(error), fix)) from error


def unshuffled(loader: Any) -> Any:
    """Return `loader` reading in the order of its dataset, if it is a DataLoader that shuffles."""
    if isinstance(loader, TogetherLoader):
        return TogetherLoader(loader.combined.mapped(unshuffled))
    batches = getattr(loader, "batch_sampler", None)
    if not isinstance(loader, DataLoader) or type(getattr(batches, "sampler", loader.sampler)) is not RandomSampler:
        return loader
    if batches is None:
        return rebuilt(loader, batch_size=None, sampler=SequentialSampler(loader.dataset))  # type: ignore[arg-type]
    return rebuilt(loader, shuffle=False, batch_size=batches.batch_size, drop_last=batches.drop_last)


def recorded(loader: Any) -> tuple[Any, list[Any] | None]:
    """Return `loader`, and the list that the indices of each of its batches will be added to.

    The list is None where there are no indices: for anything but a DataLoader of a map-style dataset in batches.
    """
    batches = loader.batch_sampler if isinstance(loader, DataLoader) else None
    if batches is None or isinstance(loader.dataset, IterableDataset):
        return loader, None
    sampler = RecordedBatches(batches)
    return rebuilt(loader, batch_sampler=sampler), sampler.seen


def parts_of(loader: Any) -> Iterator[Any]:
    """Yield `loader`, its samplers and its dataset, of several loaders read together those of each."""
    combined = getattr(loader, "combined", None)
    for part in combined.flattened if isinstance(combined, CombinedLoader) else ():
        yield from parts_of(part)
    batches = getattr(loader, "batch_sampler", None)
    yield from (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    yield getattr(loader, "dataset", None)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell every part of `loader` that asks for it which epoch begins."""
    for part in parts_of(loader):
        tell_epoch(part, epoch)


def seeds_of(loader: Any) -> list[int]:
    """Return the seeds of the orders that xtrain draws."""
    return [part.seed for part in parts_of(loader) if isinstance(part, _DRAWN)]


def order_is_portable(loader: Any) -> bool:
    """Return whether a run with another number of processes reads `loader` in the same order."""
    samplers = [part for part in parts_of(loader) if isinstance(part, Sampler) and type(part) is not BatchSampler]
    return all(isinstance(sampler, (SequentialSampler, *_DRAWN)) for sampler in samplers)


def set_seeds(loader: Any, seeds: list[int]) -> None:
    """Let `loader` draw the orders of an earlier run, given by `seeds_of`."""
    drawn = [part for part in parts_of(loader) if isinstance(part, _DRAWN)]
    for part, seed in zip(drawn, seeds, strict=False):
        part.seed = seed


def common_size(size: int | None, ranks: Collectives, uneven: str) -> int | None:
    """Return the number of batches all ranks will read, None if a rank cannot tell beforehand.

    Args:
        size: this rank's number of batches.
        ranks: the processes of the run.
        uneven: ``"drop"`` takes the smallest, ``"finish"`` the largest.
    """
    if ranks.world_size == 1:
        return size
    local = torch.tensor([-1 if size is None else size])
    sizes = [int(s) for s in ranks.all_gather(local).flatten()]
    if -1 in sizes:
        return None
    return min(sizes) if uneven == "drop" else max(sizes)


def repeat_last(batches: Iterable[Any], size: int) -> Iterator[Any]:
    """Yield the batches, then the last one again and again.

    Args:
        batches: this rank's.
        size: how many there are, so they say; other ranks may have more.

    Raises:
        ConfigurationError: if there are fewer.
    """
    last, count = END, 0
    for last in batches:  # used after the loop
        count += 1
        yield last
    if count < size:
        fix = "__len__ that counts what __iter__ gives, or none at all: ranks that do not know agree on each batch"
        raise ConfigurationError(explain(f"{size} batches, as len(loader) says", f"{count} on this rank", fix))
    while count:
        yield last


def agreed(batches: Iterable[Any], ranks: Collectives, uneven: str) -> Iterator[tuple[Any, bool]]:
    """Yield ``(batch, is_last)`` until the ranks agree to stop, though they do not know their lengths.

    One batch is read ahead, and the question whether there is another travels while the step runs.

    Args:
        batches: this rank's.
        ranks: the processes of the run.
        uneven: ``"drop"`` stops with the first rank that has no more, ``"finish"`` with the last; a rank
            without more repeats its last batch until then.

    Raises:
        ConfigurationError: on every rank, if only some of them have a batch at all and ``"finish"`` goes on.
    """
    source, last = iter(batches), END

    def ahead() -> tuple[Any, Any]:
        batch = next(source, END)
        more = batch is not END
        # "everyone has more", or "not everyone is done"
        return batch, ranks.all_true(more if uneven == "drop" else not more)

    def goes_on(answer: Any) -> bool:
        return bool(answer()) is (uneven == "drop")

    batch, answer = ahead()
    on = goes_on(answer)
    if on and uneven == "finish" and not ranks.all_true(batch is not END)():
        fix = "Trainer(uneven_batches='drop'), or a loader with at least one batch per rank"
        raise ConfigurationError(explain("a batch on every rank", "none on some of them", fix))
    while on:
        last = last if batch is END else batch
        following, answer = ahead()
        on = goes_on(answer)
        yield last, not on
        batch = following
