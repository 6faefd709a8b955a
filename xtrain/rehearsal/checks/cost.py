"""FLOPs of a training step and of each optimizer's part of it, and what that takes at least on named chips."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import nn

from xtrain.rehearsal.check import Check, Request, Yield
from xtrain.rehearsal.checks.chips import CHIPS
from xtrain.rehearsal.checks.memory import precision_of
from xtrain.rehearsal.checks.meter import Measured, measure
from xtrain.rehearsal.findings import Figure, Severity

_LEAST_STEPS = 10  # of a critic that is trained five times as often


class Cost(Check):
    """Trains on tensors that have shapes and no numbers, and counts FLOPs."""

    name: ClassVar[str] = "cost"
    ids: ClassVar[dict[str, Severity]] = {}
    group: ClassVar[str] = "numberless"
    seconds: ClassVar[float] = 100.0

    def run(self, request: Request) -> Iterator[Yield]:
        """Count, and divide by what chips can do."""
        precision = precision_of(request)
        measured = measure(request.subject, max(request.steps, _LEAST_STEPS), precision)
        flops = measured.meter.flops / measured.steps
        traffic = measured.meter.traffic / measured.steps
        yield Figure("cost.flops", flops)
        yield Figure("cost.optimizers", {name: n / measured.steps for name, n in measured.optimizers.items()})
        yield Figure("cost.bytes", traffic)
        yield Figure("cost.intensity", flops / traffic if traffic else 0.0)
        least = _least_traffic(measured, request.subject.module())
        bounds = {chip.name: chip.bound(flops, least, half="16" in precision) for chip in CHIPS}
        yield Figure("cost.seconds_at_least", bounds)
        yield Figure("cost.steps_per_hour_at_most", {name: round(3600 / s) for name, s in bounds.items() if s})


def _least_traffic(measured: Measured, module: nn.Module) -> float:
    """Return the bytes that no compiler saves: what is trained is read and written once, its state as well."""
    peak = measured.meter.peak
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    return 2.0 * (trained + peak.get("state", 0))
