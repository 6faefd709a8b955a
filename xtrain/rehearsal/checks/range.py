"""Numbers that a training in 16 bits loses: too large or too small for fp16, or too small a change for bf16."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import nn

from xtrain.callbacks.base import Callback
from xtrain.rehearsal.check import Check, Request, Yield
from xtrain.rehearsal.checks.numbers import LARGEST, VANISHES, NumberWatch
from xtrain.rehearsal.findings import Figure, Finding, Severity, Skipped
from xtrain.rehearsal.places import place_of_layer

MIXED, HALVES, BRAIN = "16-mixed", "16-true", "bf16-true"
_FIRST_SCALE = 16  # its exponent: a training begins with 2**16
_MANY_VANISH = 0.5
_MANY_STUCK = 0.95
_LEAST = 16  # parameters of a layer: what happens to fewer says little
_STEPS = 4
_LARGEST_SCALE, _MOST_STEPS = 40, 64  # each skipped step halves the scale
_PATIENCE = 16.0  # seconds in real fp16, where a convolution is about
_SLOWER = 22  # times slower than in fp32 (measured)


class Range(Check):
    """Trains in fp32 on the CPU with products rounded to fp16, and asks what 16 bits would have made of the numbers."""

    name: ClassVar[str] = "range"
    ids: ClassVar[dict[str, Severity]] = {
        "XT-RANGE-01": "error",
        "XT-RANGE-02": "warning",
        "XT-RANGE-03": "warning",
    }
    targets: ClassVar[tuple[str, ...]] = (MIXED, HALVES, BRAIN)
    seconds: ClassVar[float] = 60.0

    def run(self, request: Request) -> Iterator[Yield]:
        """Look at one fit for all precisions; a second one, in real fp16, confirms an overflow, and finds the scale."""
        module, began = request.subject.module(), time.monotonic()
        watch = NumberWatch(module)
        with watch.products:
            request.subject.fit(module, max(request.steps, _STEPS), [watch])
        asked = sorted(request.targets & {MIXED, HALVES})
        scale = 2.0 ** min(_settled(watch), _FIRST_SCALE)
        if MIXED in asked or (asked and watch.overflow is not None):
            real, told = _in_real(request, watch, time.monotonic() - began)
            if told and real.overflow is None:
                yield Skipped("range", f"real fp16 on this machine, which confirms an overflow and the scale: {told}")
            yield from _overflows(watch, real, told, asked[0])
            if real.good >= _STEPS and not told:
                yield Figure("range.scale", real.scale)
                scale = min(scale, real.scale)
        if asked:
            yield from _vanished(watch, module, {MIXED: scale, HALVES: 1.0}, asked)
        if BRAIN in request.targets:
            yield from _stuck(watch, module)


# ---------------------------------------------------------------- real fp16


class _Settles(Callback):
    """Ends a fit when the loss scale has settled, or when it takes too long."""

    def __init__(self, watch: NumberWatch, good: int) -> None:
        self._watch, self._good, self._end = watch, good, time.monotonic() + _PATIENCE

    def on_train_batch_end(self, trainer: Any, module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        late = time.monotonic() > self._end
        trainer.should_stop = late or self._watch.good >= self._good or self._watch.loses


def _in_real(request: Request, watch: NumberWatch, seconds: float) -> tuple[NumberWatch, str]:
    """Return what a fit in fp16 has shown that begins with the largest scale possible, and why it has ended early."""
    module = request.subject.module()
    real = NumberWatch(module, rounding=False)
    if seconds / _STEPS * _SLOWER > _PATIENCE:
        return real, "a step would take too long"
    good = max(_STEPS, watch.overflow.step if watch.overflow else 0)
    options = {"precision": MIXED, "scaler_kwargs": {"init_scale": 2.0 ** min(_settled(watch), _LARGEST_SCALE)}}
    try:
        with real.products:
            request.subject.fit(module, _MOST_STEPS, [real, _Settles(real, good)], **options)
    except Exception as error:  # not every operation has fp16 on the CPU
        return real, f"{type(error).__name__}: {error}".splitlines()[0]
    return real, "" if real.good >= good or real.overflow else "the scale had not settled in time"


def _settled(watch: NumberWatch) -> int:
    """Return the exponent of the largest scale with which no gradient of a layer overflows; others may."""
    return math.floor(math.log2(LARGEST / watch.largest)) if watch.largest else _FIRST_SCALE


# ---------------------------------------------------------------- too large


def _overflows(watch: NumberWatch, real: NumberWatch, told: str, target: str) -> Iterator[Yield]:
    found = watch.overflow
    if found is None or (real.overflow is None and not told):
        return  # none, or in a part that the step itself computes in fp32
    if real.overflow is not None and real.overflow.layer != found.layer:
        found = real.overflow
    size = f"a number of {found.size:.3g}" if math.isfinite(found.size) else "a larger number"
    end = ""
    if real.overflow is not None:
        lost = "which skips the step" if real.loses else "which goes on with it"
        end = f"; so has a training in real fp16 on the CPU, {f'which ends with {told}' if told else lost}"
    what = found.layer or "this product"
    text = f"fp16 ends at {LARGEST:.0f}, and {what} has {size} in step {found.step}{end}"
    fix = "Trainer(precision='bf16-mixed'), or a norm before this layer"
    mild = real.overflow is not None and not real.loses and not told
    yield Finding("XT-RANGE-01", text, fix, *found.place, target, "warning" if mild else None)


# ---------------------------------------------------------------- too small


def _vanished(watch: NumberWatch, module: nn.Module, scales: Mapping[str, float], asked: list[str]) -> Iterator[Yield]:
    """Yield the shares, and for each precision the layer that loses most."""
    shares = {}
    for target in asked:
        gone = {layer: _small(sizes, scales[target]) for layer, sizes in watch.gradients.items()}
        seen = {layer: sizes.total() for layer, sizes in watch.gradients.items()}
        shares[target] = _share(gone, seen)
        layer, most = _worst(gone, seen, watch.sizes)
        if most > _MANY_VANISH:
            text = (
                f"{most:.0%} of the gradients of {_named(layer)} are zero in fp16 "
                f"with a scale of {scales[target]:.4g} ({shares[target]:.0%} of all)"
            )
            fix = f"Trainer(precision='{'bf16-mixed' if target == MIXED else MIXED}')"
            yield Finding("XT-RANGE-02", text, fix, *place_of_layer(module, layer), target)
    yield Figure("range.vanished", shares)


def _small(sizes: Counter[int], scale: float) -> int:
    return sum(count for exponent, count in sizes.items() if exponent + math.log2(scale) <= VANISHES)


# ---------------------------------------------------------------- too small a change


def _stuck(watch: NumberWatch, module: nn.Module) -> Iterator[Yield]:
    share = _share(watch.stuck, watch.updates)
    yield Figure("range.unmoved", share)
    layer, most = _worst(watch.stuck, watch.updates, watch.sizes)
    if most > _MANY_STUCK:
        text = (
            f"{most:.0%} of the updates of {_named(layer)} are smaller than half a unit in the last place of bf16: "
            f"these parameters do not move ({share:.0%} of all)"
        )
        fix = "Trainer(precision='bf16-mixed'), which keeps parameters in fp32"
        yield Finding("XT-RANGE-03", text, fix, *place_of_layer(module, layer), BRAIN)


# ---------------------------------------------------------------- shares


def _share(part: Mapping[str, int], whole: Mapping[str, int]) -> float:
    return sum(part.values()) / max(sum(whole.values()), 1)


def _worst(part: Mapping[str, int], whole: Mapping[str, int], sizes: Mapping[str, int]) -> tuple[str, float]:
    """Return the layer with the largest share, the first of equals, out of those that are not tiny."""
    shares = [(layer, part[layer] / count) for layer, count in whole.items() if count and sizes[layer] >= _LEAST]
    return max(shares, key=lambda pair: pair[1], default=("", 0.0))


def _named(layer: str) -> str:
    return layer or "the module's own parameters"
