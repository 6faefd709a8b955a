"""What a module is made of that means something else on several processes, or trains other parameters than it seems."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from xtrain.callbacks.base import Callback
from xtrain.rehearsal.check import PROCESSES, Check, Request, Yield
from xtrain.rehearsal.findings import Finding, Severity
from xtrain.rehearsal.places import Place, current_place, place_of_layer, place_of_optimizer

_SHOWN = 3


class Module(Check):
    """Looks at layers, buffers, parameters and random numbers."""

    name: ClassVar[str] = "module"
    ids: ClassVar[dict[str, Severity]] = {
        "XT-MODULE-01": "warning",
        "XT-MODULE-02": "warning",
        "XT-MODULE-03": "warning",
        "XT-MODULE-04": "warning",
        "XT-MODULE-05": "warning",
    }

    def run(self, request: Request) -> Iterator[Yield]:
        """Train for some steps, and compare what moved with what should."""
        module, watch = request.subject.module(), _Watch()
        with _seeds_watched() as seeds:
            request.subject.fit(module, request.steps, [watch])
        yield from _parameters(module, watch)
        if PROCESSES in request.targets or request.devices:
            several = (request.devices or 1) > 1
            yield from _batch_statistics(module, request, "warning" if several else "info")
            yield from _moving_buffers(module, watch, request, "warning" if several else "info")
            yield from _alike(module, seeds)


class _Watch(Callback):
    """Notes which buffers move and which parameters get gradients."""

    def __init__(self) -> None:
        self.optimizers: list[Any] = []
        self.frozen: list[set[int]] = []
        self.required: set[str] = set()
        self.reached: set[str] = set()
        self.moved: set[str] = set()
        self._buffers: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.optimizers = list(trainer.optimizers)
        groups = [[p for group in o.param_groups for p in group["params"]] for o in self.optimizers]
        self.frozen = [{id(p) for p in group if not p.requires_grad} for group in groups]
        self.required = {name for name, p in module.named_parameters() if p.requires_grad}
        self._buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        self.reached |= {name for name, p in module.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = dict(module.named_buffers())
        self.moved |= {n for n, old in self._buffers.items() if n in now and not _equal(now[n], old)}


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _parameters(module: nn.Module, watch: _Watch) -> Iterator[Finding]:
    """Yield parameters that are in no optimizer, and frozen ones that are in one."""
    held = {id(p) for o in watch.optimizers for group in o.param_groups for p in group["params"]}
    names = {id(p): name for name, p in module.named_parameters()}
    left: dict[str, list[str]] = {}
    for key, name in names.items():
        if key not in held and name in watch.required:
            left.setdefault(name.rpartition(".")[0], []).append(name)
    for layers in _by_child(left).values():
        reached = [name for name in layers if name in watch.reached]
        text = f"{_few(layers)}: in no optimizer, so never trained"
        text += "; their gradients are made, and grow with every step" if reached else ""
        fix = "put them into an optimizer, or .requires_grad_(False)"
        place = place_of_layer(module, layers[0].rpartition(".")[0] or layers[0])
        yield Finding("XT-MODULE-03", text, fix, *place, severity=None if reached else "info")
    for optimizer, frozen in zip(watch.optimizers, watch.frozen, strict=True):
        inside = [names.get(key, "a parameter of no layer") for key in frozen]
        if inside:
            text = f"{_few(sorted(inside))}: in this optimizer, but they do not require gradients when training starts"
            fix = "torch.optim.Adam([p for p in self.parameters() if p.requires_grad])"
            yield Finding("XT-MODULE-04", text, fix, *place_of_optimizer(optimizer, module))


def _by_child(layers: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return names of parameters by the child of the module that they are in."""
    grouped: dict[str, list[str]] = {}
    for names in layers.values():
        for name in names:
            grouped.setdefault(name.split(".")[0], []).append(name)
    return grouped


def _batch_statistics(module: nn.Module, request: Request, severity: Severity) -> Iterator[Finding]:
    names = [n for n, layer in module.named_modules() if isinstance(layer, _BatchNorm) and _normalises_by_batch(layer)]
    if names:  # one finding for all of them: one argument of the Trainer mends all
        subject = f"{names[0]} normalises" if len(names) == 1 else f"{len(names)} layers ({_few(names)}) normalise"
        text = f"{subject} by the 1/{request.processes} of the batch that each process has"
        fix = "Trainer(sync_batchnorm=True), or nn.GroupNorm"
        yield Finding("XT-MODULE-01", text, fix, *place_of_layer(module, names[0]), PROCESSES, severity)


def _normalises_by_batch(layer: _BatchNorm) -> bool:
    return layer.training and not isinstance(layer, nn.SyncBatchNorm)


def _moving_buffers(module: nn.Module, watch: _Watch, request: Request, severity: Severity) -> Iterator[Finding]:
    statistics = {f"{n}." for n, layer in module.named_modules() if isinstance(layer, _BatchNorm)}
    by_place: dict[Place, list[str]] = {}
    for name in sorted(watch.moved):
        if not name.startswith(tuple(statistics)):
            by_place.setdefault(place_of_layer(module, name.rpartition(".")[0] or name), []).append(name)
    for place, names in by_place.items():
        subject = (
            f"the buffer {names[0]} changes" if len(names) == 1 else f"{len(names)} buffers ({_few(names)}) change"
        )
        text = f"{subject} in a step: each process sees its own batches, and rank 0's value is kept"
        fix = "self.all_gather(update).mean(0) before it is added, or a value that does not depend on the batch"
        yield Finding("XT-MODULE-02", text, fix, *place, PROCESSES, severity)


# ---------------------------------------------------------------- random numbers


@contextmanager
def _seeds_watched() -> Iterator[list[tuple[str, Place]]]:
    """Note where user code sets a seed during a fit."""
    seen: list[tuple[str, Place]] = []
    originals: list[tuple[Any, str]] = [(torch, "manual_seed"), (torch.random, "manual_seed"), (random, "seed")]
    kept = [getattr(owner, name) for owner, name in originals]

    def watching(label: str, original: Any) -> Any:
        def seed(*arguments: Any, **options: Any) -> Any:
            place = current_place()
            if place.line is not None and _is_called_by(place):
                seen.append((label, place))
            return original(*arguments, **options)

        return seed

    for (owner, name), original in zip(originals, kept, strict=True):
        setattr(owner, name, watching(f"{owner.__name__}.{name}", original))
    try:
        yield seen
    finally:
        for (owner, name), original in zip(originals, kept, strict=True):
            setattr(owner, name, original)


def _is_called_by(place: Place) -> bool:
    """Return whether the line of the user's code is inside of a step: scripts call `fit` from one, too."""
    import inspect

    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name.endswith("_step") and frame.f_code.co_name.startswith(("training", "validation")):
            return True
        frame = frame.f_back
    return False


def _alike(module: nn.Module, seeds: list[tuple[str, Place]]) -> Iterator[Finding]:
    for label, place in dict.fromkeys(seeds):
        text = f"{label} in a step: every process draws the same dropout and noise for its own batch, in every step"
        fix = "seed_everything(42) once, before the Trainer; xtrain gives each process its own numbers"
        yield Finding("XT-MODULE-05", text, fix, *place, PROCESSES)
    for path, part in module.named_modules():
        for key, value in vars(part).items():
            if isinstance(value, torch.Generator):
                text = f"the generator {key} has the same seed on every process: they draw the same numbers"
                fix = f"self.{key}.manual_seed(seed + self.global_rank) in on_fit_start"
                place = place_of_layer(module, f"{path}.{key}" if path else key)
                yield Finding("XT-MODULE-05", text, fix, *place, PROCESSES)
