"""Lines of a training step for which the host waits until the device has computed everything before them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from xtrain.callbacks.base import Callback
from xtrain.compat.backends import FALLBACK
from xtrain.registry import registered_backends
from xtrain.rehearsal.check import Check, Request, Yield
from xtrain.rehearsal.findings import Figure, Finding, Severity
from xtrain.rehearsal.places import NOWHERE, Place, direct_place

_ATEN = torch.ops.aten
_READS = {_ATEN._local_scalar_dense, _ATEN.equal, _ATEN.is_nonzero}
_SHAPES = {
    _ATEN.nonzero, _ATEN.masked_select, _ATEN._unique, _ATEN._unique2, _ATEN.unique_dim, _ATEN.unique_consecutive,
    _ATEN.unique_dim_consecutive, _ATEN.bincount,
}  # fmt: skip
_INDEXING = {_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._index_put_impl_}
_HOST = torch.device("cpu")
_COPIES = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__repr__, Tensor.__format__}

_TEXTS = {
    "XT-SYNC-01": (
        "the host reads a number here, and waits for the device",
        "self.log(name, value), or torch.where(condition, a, b) in place of if",
    ),
    "XT-SYNC-02": (
        "a shape depends on numbers here, so the host waits for them",
        "torch.where(mask, x, 0), x * mask, or topk: shapes that stay as they are",
    ),
    "XT-SYNC-03": (
        "a tensor is copied to the host here, which waits for the device",
        "value.detach(), kept where it is; .cpu() in on_train_epoch_end",
    ),
}


class Syncs(Check):
    """Trains on the CPU, and looks at every operation that a device would have to be waited for."""

    name: ClassVar[str] = "syncs"
    ids: ClassVar[dict[str, Severity]] = dict.fromkeys(_TEXTS, "warning")

    def run(self, request: Request) -> Iterator[Yield]:
        """Count by line; what a first step alone does is no cost of training."""
        devices = sorted((request.targets & set(registered_backends())) - {FALLBACK})
        if not devices:
            return
        watch = _Watch()
        with watch.operations, watch.functions:
            request.subject.fit(request.subject.module(), max(request.steps, 4), [watch])
        counts = Counter(sync for _, sync in watch.seen)
        steps = Counter(sync for _, sync in set(watch.seen))
        often = {sync: count / watch.steps for sync, count in counts.items() if steps[sync] > 1}
        yield Figure("syncs.per_step", sum(often.values()))
        for (id, place), count in often.items():
            text, fix = _TEXTS[id]
            told = f"{text} ({count:.3g} times in a step)"
            target = devices[0] if len(devices) == 1 else "all"
            yield Finding(id, told, fix, *place, target, None if count >= 0.5 else "info")


class _Sync(NamedTuple):
    id: str
    place: Place


class _Watch(Callback):
    """What was waited for in which step, while `operations` and `functions` are on.

    Attributes:
        seen: of each time the step and the line.
        steps: that have begun.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[int, _Sync]] = []
        self.steps = 0
        self.operations, self.functions = _Operations(self), _Functions(self)
        self._training = False

    def on_train_batch_start(self, trainer: Any, module: nn.Module, batch: Any, batch_idx: int) -> None:
        self.steps, self._training = self.steps + 1, True

    def on_train_batch_end(self, trainer: Any, module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._training = False

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Note nothing inside."""
        training, self._training = self._training, False
        try:
            yield
        finally:
            self._training = training

    def note(self, id: str) -> None:
        """Note the user's line that runs now, if it is the one that waits."""
        place = direct_place(__file__) if self._training else NOWHERE
        if place.line:
            self.seen.append((self.steps, _Sync(id, place)))


class _Operations(TorchDispatchMode):
    """Sees operations with a result that the host must know."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet = function._overloadpacket
        if packet in _READS:
            self._watch.note("XT-SYNC-01")
        elif packet in _SHAPES or _depends_on_numbers(packet, args, kwargs or {}):
            self._watch.note("XT-SYNC-02")
        return function(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Sees copies to the host, which are no operations while the host is the device."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is one_hot and _classes_of(args, kwargs or {}) >= 0:
            with self._watch.quiet():  # the number of classes is checked on the CPU only
                return function(*args, **(kwargs or {}))
        if function in _COPIES or (function is Tensor.to and _names_the_host((*args[1:], *(kwargs or {}).values()))):
            self._watch.note("XT-SYNC-03")
        return function(*args, **(kwargs or {}))


def _depends_on_numbers(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if packet is _ATEN.repeat_interleave:
        return kwargs.get("output_size") is None
    if packet not in _INDEXING or not _has_mask(args[1]):
        return False
    value = args[2] if len(args) > 2 else None  # x[mask] = 0.0 fills where the mask is, and needs no shape
    return not (isinstance(value, Tensor) and value.dim() == 0)


def _has_mask(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _classes_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return int(kwargs.get("num_classes", args[1] if len(args) > 1 else -1))


def _names_the_host(arguments: tuple[Any, ...]) -> bool:
    """Return whether ``"cpu"`` is written there; a device that is an object is that of another tensor, mostly."""
    return _HOST.type in [argument for argument in arguments if isinstance(argument, str)]
