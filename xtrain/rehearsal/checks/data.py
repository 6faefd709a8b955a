"""What the loader gives on several processes: how large a batch becomes, which samples are read twice or not at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, WeightedRandomSampler

from xtrain.data.combined import CombinedLoader
from xtrain.rehearsal.check import PROCESSES, Check, Request, Yield
from xtrain.rehearsal.findings import Figure, Finding, Severity, Skipped
from xtrain.rehearsal.places import Place, place_of_loader

_MOST_INDICES = 200_000


class Data(Check):
    """Looks at the training loader, and reads some batches where that alone tells."""

    name: ClassVar[str] = "data"
    ids: ClassVar[dict[str, Severity]] = {
        "XT-DATA-01": "info",
        "XT-DATA-02": "warning",
        "XT-DATA-03": "warning",
        "XT-DATA-04": "warning",
        "XT-DATA-05": "error",
        "XT-DATA-06": "info",
        "XT-DATA-07": "info",
    }
    runs_steps: ClassVar[bool] = False

    def run(self, request: Request) -> Iterator[Yield]:
        """Count samples, batches and workers."""
        subject = request.subject
        if subject.made_up:
            yield Skipped(self.name, "the batches are those of --batch: name your loader by --data FILE.py:NAME")
            return
        module = subject.module()
        loader = subject.loader(module)
        if loader is None:
            yield Skipped(self.name, "the module trains without a loader")
            return
        for part in _parts(loader):
            yield from self._of_loader(part, request, module)

    def _of_loader(self, loader: Any, request: Request, module: nn.Module) -> Iterator[Yield]:
        place = place_of_loader(loader, module)
        if not isinstance(loader, DataLoader):
            yield from _of_another_kind(loader, request, place)
            return
        yield from _sizes(loader, request, place)
        yield from _seen_twice(loader, place)
        if not isinstance(loader.dataset, IterableDataset):
            yield from _last_batch(loader, request, module, place)


def _parts(loader: Any) -> list[Any]:
    """Return the loaders of a dict, a list or a `CombinedLoader` of loaders, else the loader itself."""
    inside = loader.iterables if isinstance(loader, CombinedLoader) else loader
    leaves = tree_leaves(inside, is_leaf=lambda leaf: isinstance(leaf, DataLoader))
    return leaves if leaves and all(isinstance(leaf, DataLoader) for leaf in leaves) else [loader]


def _several(request: Request) -> bool:
    return (request.devices or 1) > 1


def _of_another_kind(loader: Any, request: Request, place: Place) -> Iterator[Yield]:
    if PROCESSES in request.targets or request.devices:
        kind = type(loader).__name__
        text = (
            f"a {kind} is no DataLoader, so each of several processes reads all of it: the same samples, in every step"
        )
        fix = "DataLoader(dataset, batch_size=64), which is split"
        yield Finding("XT-DATA-02", text, fix, *place, PROCESSES, None if _several(request) else "info")


def _sizes(loader: DataLoader[Any], request: Request, place: Place) -> Iterator[Yield]:
    """Yield how large a batch of all processes is, whether each has one, and whether anybody loads ahead."""
    batch = loader.batch_size
    devices = request.devices or 1
    yield Figure("data.batch", batch)
    yield Figure("data.workers", loader.num_workers)
    if loader.num_workers == 0:
        yield Finding("XT-DATA-07", "nobody loads while a device computes", "num_workers=4", *place)
    if batch is None or not _several(request):
        return
    yield Figure("data.effective_batch", batch * devices)
    text = f"a step sees {batch * devices} samples: batch_size={batch} is that of each of {devices} processes"
    yield Finding("XT-DATA-01", text, f"batch_size={max(1, batch // devices)}, or a larger lr", *place, PROCESSES)
    if isinstance(loader.dataset, IterableDataset):
        return
    count = len(loader.dataset)  # type: ignore[arg-type]  # a dataset with indices has a length
    if count < batch * devices:
        text = f"{count} samples are fewer than one batch of {batch} on each of {devices} processes"
        yield Finding("XT-DATA-03", text, f"batch_size={max(1, count // devices)}", *place, PROCESSES)
    elif count % devices:
        text = f"{count} samples on {devices} processes: {-count % devices} are read twice in an epoch"
        yield Finding("XT-DATA-03", text, "nothing, if that may be", *place, PROCESSES, "info")


# ---------------------------------------------------------------- samples that come twice


def _seen_twice(loader: DataLoader[Any], place: Place) -> Iterator[Finding]:
    if isinstance(loader.dataset, IterableDataset):
        if loader.num_workers > 1 and _workers_repeat(loader):
            count = loader.num_workers
            text = f"each of {count} workers reads the whole stream: every sample comes {count} times"
            fix = "info = torch.utils.data.get_worker_info(); itertools.islice(stream, info.id, None, info.num_workers)"
            yield Finding("XT-DATA-04", text, fix, *place)
        return
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    meant = isinstance(sampler, WeightedRandomSampler) or (isinstance(sampler, RandomSampler) and sampler.replacement)
    if meant or loader.batch_sampler is None:
        return
    indices = [i for batch in itertools.islice(loader.batch_sampler, _MOST_INDICES) for i in batch]
    twice = len(indices) - len(set(indices))
    if twice:
        text = f"{twice} of {len(indices)} indices of an epoch come more than once"
        yield Finding("XT-DATA-04", text, "a sampler that gives each index once", *place)


def _workers_repeat(loader: DataLoader[Any]) -> bool:
    """Return whether the first batches of two workers, which come one after the other, are the same."""
    first, *others = list(itertools.islice(loader, 2))
    return bool(others) and _same(first, others[0])


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


# ---------------------------------------------------------------- the last batch


def _last_batch(loader: DataLoader[Any], request: Request, module: nn.Module, place: Place) -> Iterator[Finding]:
    batch = loader.batch_size
    if batch is None or loader.drop_last:
        return
    count = len(loader.dataset)  # type: ignore[arg-type]
    rest = count % batch
    if not rest or count < batch:
        return
    if rest == 1 and (error := _fails_on_one(loader, request, module)):
        text = f"{count} samples leave a last batch of one, with which the step fails: {error}"
        yield Finding("XT-DATA-05", text, "DataLoader(..., drop_last=True)", *place)
        return
    text = (
        f"the last batch of an epoch has {rest} of {batch} samples: its loss is as heavy, and compilers see a new shape"
    )
    yield Finding("XT-DATA-06", text, "DataLoader(..., drop_last=True)", *place)


def _fails_on_one(loader: DataLoader[Any], request: Request, module: nn.Module) -> str:
    """Return the error of a step on one sample, if the module has layers that want several."""
    if not any(isinstance(layer, _BatchNorm) for layer in module.modules()):
        return ""
    alone = replace(request.subject, data=[loader.collate_fn([loader.dataset[0]])])
    try:
        alone.fit(alone.module(), 1)
    except ValueError as error:
        return str(error)
    return ""
