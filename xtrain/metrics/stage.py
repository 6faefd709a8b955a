"""What is collected while one loop runs, and what of it the ranks share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import Tensor

from xtrain.collectives import Collectives
from xtrain.metrics.metric import Metric
from xtrain.metrics.ranks import Value, match_names, reduce_over_ranks

StageName: TypeAlias = Literal["train", "validate", "test", "sanity", "idle"]
_OBJECT = "torchmetrics"  # stands for the reduction of what reduces itself


@dataclass(slots=True)
class Stage:
    """What is collected while one loop runs, and where that loop is."""

    name: StageName
    scopes: defaultdict[tuple[str, int | None], dict[str, Metric]] = field(default_factory=lambda: defaultdict(dict))
    scope: dict[str, Metric] = field(default_factory=dict)  # the one of the hook that runs now
    hook: str = ""
    batch: Any = None
    batch_size: int | None = None  # None: not asked for yet
    dataloader: int | None = None
    steps: int = 0
    late: dict[Metric, float] = field(default_factory=dict)  # step values that the ranks reduce at the end
    row: dict[str, float] = field(default_factory=dict)  # step values that were read and not sent yet
    kept: list[tuple[int, dict[Metric, Tensor | float]]] = field(default_factory=list)  # of evaluation, by step

    @property
    def evaluates(self) -> bool:
        """Whether ranks may have unequally many batches here, or none."""
        return self.name != "train"

    def keep_steps(self, number: int) -> None:
        """Keep the step values of evaluation step `number`: each becomes a row, wherever the log points are."""
        row = {m: m.latest for m in self.metrics() if m.on_step and m.fresh and not m.shared and m.latest is not None}
        for metric in row:
            metric.fresh = False
        if row:
            self.kept.append((number, row))

    def metrics(self) -> list[Metric]:
        """Return what was logged, in all hooks."""
        return [metric for scope in self.scopes.values() for metric in scope.values()]


def step_key(metric: Metric) -> str:
    """Return what the ranks match the step value of `metric` by, where its epoch value is reduced with it."""
    return f"{metric.key} (step)"


def agree_on_epoch(stage: Stage, ranks: Collectives) -> dict[str, str]:
    """Return what the ranks are about to reduce at the end of an epoch, by key, with the reductions.

    Raises:
        ProtocolError: on every rank, if they do not have the same.
    """
    if ranks.world_size == 1 or stage.name == "idle":
        return {}
    metrics = stage.metrics()
    new = [m for m in metrics if m.shared and (m.waiting or (m.read and m.result is None))]
    own = {m.key: str(m.op) for m in new}
    own |= {m.key: _OBJECT for m in metrics if m.source is not None and m.on_epoch and not m.stale}
    steps = {m for m in metrics if m.shared and m.on_step and m.fresh} | stage.late.keys()
    own |= {step_key(m): str(m.op) for m in steps}
    excused = stage.evaluates and stage.steps == 0
    found = match_names(own, ranks, f"at the end of an epoch ({stage.name})", excused)
    apart = {step_key(m) for m in steps if not stage.evaluates}  # of training steps: they are reduced by themselves
    return {key: op for key, op in found.items() if op != _OBJECT and key not in apart}


def values_of_epoch(stage: Stage, reduced: Iterable[Metric]) -> dict[str, Value]:
    """Return what this rank brings to that: the epoch values of `reduced`, and step values that waited."""
    values = {step_key(m): Value(str(m.op), value, 1.0) for m, value in stage.late.items()}
    return values | {m.key: Value(str(m.op), m.reduce(), sum(m.read_weights)) for m in reduced if m.shared}


def reduce_steps(steps: Mapping[Metric, float], ranks: Collectives) -> dict[Metric, float]:
    """Return the step values `steps` reduced over the ranks."""
    values = {m.key: Value(str(m.op), value, 1.0) for m, value in steps.items()}
    whole = reduce_over_ranks(values, ranks, "in steps")
    return {metric: whole[metric.key] for metric in steps}
