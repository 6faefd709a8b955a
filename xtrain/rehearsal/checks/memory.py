"""How much memory a training takes on each device, which way of dividing it is enough, and how large a batch may be."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from xtrain.compat.backends import FALLBACK
from xtrain.layouts import Layout, Parts
from xtrain.module import LightningModule
from xtrain.precision import PRECISIONS
from xtrain.registry import get_backend_class, registered_backends
from xtrain.rehearsal.check import Check, Request, Yield
from xtrain.rehearsal.checks.meter import Measured, measure
from xtrain.rehearsal.findings import Figure, Finding, Severity, Skipped
from xtrain.rehearsal.places import place_of_loader
from xtrain.rehearsal.subject import Subject

_STEPS = 3  # states are made in the first one
_MOST_DOUBLINGS = 24


class Way(NamedTuple):
    """A backend with one of its layouts."""

    backend: str
    layout: Layout

    def __str__(self) -> str:
        return f"backend={self.backend!r}" + (f", {self.layout.options}" if self.layout.options else "")

    @property
    def key(self) -> str:
        """What it is called in a table: ``"deepspeed {'stage': 2}"``."""
        return f"{self.backend} {self.layout.options.partition('=')[2]}".rstrip()


class Memory(Check):
    """Trains on tensors that have shapes and no numbers, and counts what lives."""

    name: ClassVar[str] = "memory"
    ids: ClassVar[dict[str, Severity]] = {"XT-MEMORY-01": "error", "XT-MEMORY-02": "info"}
    group: ClassVar[str] = "numberless"
    seconds: ClassVar[float] = 100.0

    def run(self, request: Request) -> Iterator[Yield]:
        """Count for the batch as it is, and for twice as large a one."""
        precision = precision_of(request)
        measured = measure(request.subject, _STEPS, precision)
        module = request.subject.module()
        parts = _parts(measured, module)
        yield Figure("memory.precision", precision)
        yield Figure("memory.parameters", parts.parameters)
        yield Figure("memory.gradients", parts.gradients)
        yield Figure("memory.state", parts.state)
        yield Figure("memory.activations", parts.activations)
        yield Figure("memory.peak", parts.peak)
        devices = request.devices or 1
        ways = list(_ways(request))
        if devices > 1:
            yield Figure("memory.per_device", {way.key: way.layout.held(parts, devices) for way in ways})
        if request.memory is None:
            return
        curve = _curve(request, ways, precision)
        if len(curve) < 2:
            yield Skipped("memory", "the largest batch: it has no common first dimension, or not every size trains")
        else:
            largest = {way.key: _largest(way, curve, request.memory, devices) for way in ways}
            yield Figure("memory.largest_batch", largest)
        yield from _verdict(request, parts, ways, module)


def precision_of(request: Request) -> str:
    """Return the one precision that the user asked for, else fp32."""
    asked = sorted(request.targets & set(PRECISIONS))
    return asked[0] if len(asked) == 1 else "32-true"


def _parts(measured: Measured, module: nn.Module) -> Parts:
    peak = measured.meter.peak
    width = next((p.element_size() for p in module.parameters()), 4)
    whole = sum(p.numel() for p in module.parameters()) * width
    scale = peak.get("parameters", 0) / whole if whole else 1.0
    largest = max((sum(p.nbytes for p in layer.parameters(recurse=False)) for layer in module.modules()), default=0)
    return Parts(
        peak.get("parameters", 0),
        peak.get("state", 0),
        peak.get("gradients", 0),
        peak.get("activations", 0),
        round(largest * min(scale, 1.0)),
    )


def _ways(request: Request) -> Iterator[Way]:
    """Yield the backends that the user asked for, with all their layouts; the processor's memory is no question."""
    seen: set[str] = set()
    for name in sorted(registered_backends()):
        if name not in request.targets:
            continue
        backend: Any = get_backend_class(name)
        if backend.name in (*seen, FALLBACK):  # an alias, or the memory of the processor
            continue
        seen.add(backend.name)
        for layout in getattr(backend, "layouts", (Layout(),)):
            yield Way(backend.name, layout)


def _batch_size(subject: Subject, module: nn.Module) -> int | None:
    """Return the first dimension that all tensors of a batch have."""
    batches = subject.batches(subject.module(), 1)
    sizes = {leaf.shape[0] if leaf.dim() else 0 for leaf in tree_leaves(batches) if isinstance(leaf, Tensor)}
    return sizes.pop() if len(sizes) == 1 and 0 not in sizes else None


def _curve(request: Request, ways: list[Way], precision: str) -> list[tuple[int, Parts]]:
    """Return what batches of 2, 4, 8, ... take, until none fits any more, or it has become a straight line."""
    subject, module = request.subject, request.subject.module()
    curve: list[tuple[int, Parts]] = []
    if _batch_size(subject, module) is None:
        return curve
    for size in (2**power for power in range(1, _MOST_DOUBLINGS)):
        try:
            measured = measure(subject, 2, precision, partial(_repeated, size=size))
        except Exception:  # a step that is written for one size: told as not looked at
            return []
        curve.append((size, _parts(measured, module)))
        parts = curve[-1][1]
        full = all(way.layout.held(parts, request.devices or 1) > (request.memory or 0) for way in ways)
        if full or _is_straight([p.peak for _, p in curve[-3:]], parts):
            break
    return curve


def _repeated(tensor: Tensor, size: int) -> Tensor:
    return tensor[:1].repeat_interleave(size, 0)


def _is_straight(peaks: list[int], last: Parts) -> bool:
    """Return whether twice the batch adds twice as much, and so will for all that follow."""
    if len(peaks) < 3 or last.activations < last.peak / 2:
        return False
    before, after = peaks[1] - peaks[0], peaks[2] - peaks[1]
    return abs(after - 2 * before) < 0.01 * after


def _largest(way: Way, curve: list[tuple[int, Parts]], memory: int, devices: int) -> int:
    """Return the largest batch of one device that fits, between those of `curve` or beyond them; 0 if none does."""
    points = [(size, way.layout.held(parts, devices)) for size, parts in curve]
    above = next((i for i, (_, held) in enumerate(points) if held > memory), len(points) - 1)
    (small, low), (large, high) = points[max(above, 1) - 1], points[max(above, 1)]
    return max(0, int(small + (memory - low) * (large - small) / max(high - low, 1)))


def _verdict(request: Request, parts: Parts, ways: list[Way], module: LightningModule) -> Iterator[Finding]:
    """Say which backends hold it, each with the least that is divided, and which cannot."""
    limit, devices = request.memory or 0, request.devices or 1
    held = {way: way.layout.held(parts, devices) for way in ways}
    place = place_of_loader(request.subject.loader(module), module)
    enough: list[Way] = []
    tight: list[Way] = []
    for name in dict.fromkeys(way.backend for way in ways):
        own = [way for way in ways if way.backend == name]
        fits = next((way for way in own if held[way] <= limit), None)
        (tight if fits is None else enough).append(fits or min(own, key=held.__getitem__))
    if enough:
        text = f"enough on {devices} with {readable(limit)} each: {_listed(enough, held)}"
        yield Finding("XT-MEMORY-02", text, f"Trainer({enough[0]}, devices={devices})")
        if len(enough) + len(tight) > 1:  # the user has not said which
            return
    for way in tight:
        text = f"{readable(held[way])} on each of {devices}, which has {readable(limit)}: {way}"
        yield Finding(
            "XT-MEMORY-01",
            text,
            "a smaller batch, more devices, or 16 bits: memory.largest_batch says how far a batch helps",
            *place,
            way.backend,
        )


def _listed(ways: list[Way], held: dict[Way, int]) -> str:
    return "; ".join(f"{way} ({readable(held[way])})" for way in ways)


def readable(size: float) -> str:
    """Return bytes for people.

    Example:
        >>> readable(1536)
        '1.5 KiB'
    """
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
