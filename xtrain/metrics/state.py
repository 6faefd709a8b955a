"""Metrics half-way through an epoch: read for a checkpoint, and set by one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xtrain.errors import CheckpointError, explain
from xtrain.metrics.checks import Settings
from xtrain.metrics.log import MetricLog
from xtrain.metrics.metric import Metric, is_torchmetric, new_metric

_VALUES = ("fresh", "latest", "waiting", "waiting_weights", "read", "read_weights", "result", "stale")


def metric_state(log: MetricLog, module: nn.Module) -> dict[str, Any]:
    """Return what `log` has collected since the epoch began; tensors are where they are.

    Args:
        log: in the stage of training.
        module: whose submodules the torchmetrics objects are.

    Raises:
        CheckpointError: for a torchmetrics object that is no submodule, and so would be lost.
    """
    stage = log._stage
    names = {id(part): name for name, part in module.named_modules()}
    rows = [
        _row(metric, hook, loader, name, names)
        for (hook, loader), scope in stage.scopes.items()
        for name, metric in scope.items()
    ]
    return {
        "rows": rows,
        "steps": stage.steps,
        "row": dict(stage.row),
        "callback": {name: _value(value) for name, value in log._callback.items()},
        "logged": {name: _value(value) for name, value in log._logged.items()},
        "progress_bar": dict(log.progress_bar_metrics),
        "evaluated": dict(log._evaluated),
        "torchmetrics": {name: _accumulated(part) for name, part in _torchmetrics(module)},
    }


def _row(metric: Metric, hook: str, loader: int | None, name: str, names: Mapping[int, str]) -> dict[str, Any]:
    source = None if metric.source is None else names.get(id(metric.source))
    if metric.source is not None and source is None:
        kind = type(metric.source).__name__
        fix = f"self.{name} = {kind}(...) in __init__, so that the checkpoint has its sums"
        raise CheckpointError(explain("torchmetrics objects that are submodules", f"{kind} logged as {name!r}", fix))
    op = metric.op if isinstance(metric.op, str) else None  # a function is the user's
    settings = metric.settings._asdict() | {"reduce_fx": op}
    state = {key: getattr(metric, key) for key in _VALUES}
    return {"hook": hook, "loader": loader, "name": name, "settings": settings, "source": source, "state": state}


def _value(value: Metric | float) -> Any:
    return value.latest if isinstance(value, Metric) else value


def _torchmetrics(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, part in module.named_modules():
        if is_torchmetric(part) and hasattr(part, "metric_state"):
            yield name, part


def _accumulated(metric: Any) -> dict[str, Any]:
    return {"state": dict(metric.metric_state), "count": int(metric._update_count)}


# -------------------------------------------------------------------- and back


def load_metric_state(
    log: MetricLog, module: nn.Module, states: Sequence[Mapping[str, Any]], ranks: int | None
) -> None:
    """Let `log` go on from what `metric_state` returned.

    Args:
        log: in the stage of training.
        module: as above.
        states: what this rank saved; what all ranks saved if there are now more or fewer of them.
        ranks: how many there are now, if that changed; else None.
    """
    first, stage = states[0], log._stage
    stage.steps, stage.row = first["steps"], dict(first["row"])
    log._callback.update(first["callback"])
    log._logged.update(first["logged"])
    log.progress_bar_metrics.update(first["progress_bar"])
    log._evaluated.update(first["evaluated"])
    parts = dict(module.named_modules())
    for row in first["rows"]:
        others = [other for state in states for other in state["rows"] if _place(other) == _place(row)]
        settings = Settings(**row["settings"])
        values = dict(row["state"])
        if ranks is not None:
            sync = settings.sync_dist and not settings.rank_zero_only
            values = _merged([other["state"] for other in others], row["settings"]["reduce_fx"], sync, ranks)
        if settings.reduce_fx is None:  # it needs the function, which comes with the next value
            log.restored[row["hook"], row["loader"], row["name"]] = values
            continue
        scope = stage.scopes[row["hook"], row["loader"]]
        name = row["name"].removesuffix(f"/dataloader_idx_{row['loader']}")
        metric = scope[row["name"]] = new_metric(name, stage.name, row["hook"], row["loader"], settings)
        metric.source = parts.get(row["source"])
        metric.filled(values)
        metric.shared = metric.sync and log._ranks.world_size > 1
        shown = log._unreduced if metric.shared else log._callback
        if metric.shown_early:
            shown[metric.name] = shown[metric.step_name] = metric
    for name, metric in _torchmetrics(module):
        saved = [state["torchmetrics"][name] for state in states if name in state["torchmetrics"]]
        if saved:
            _set_accumulated(metric, saved[0] if ranks is None else _divided(metric, name, saved, log._ranks.rank))


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["hook"], row["loader"], row["name"]


def _merged(states: Sequence[Mapping[str, Any]], op: str | None, sync: bool, ranks: int) -> dict[str, Any]:
    """Return the values of all ranks of an earlier run for each of `ranks` ranks: together they come to the same."""
    values = [float(v) for state in states for v in (*state["read"], *state["waiting"])]
    weights = [float(w) for state in states for w in (*state["read_weights"], *state["waiting_weights"])]
    merged = {
        **states[0],
        "waiting": [],
        "waiting_weights": [],
        "result": None,
        "read": values,
        "read_weights": weights,
    }
    if op is None or not values:
        return merged
    mass, share = sum(weights), ranks if sync else 1
    folds = {
        "mean": sum(v * w for v, w in zip(values, weights, strict=True)) / mass,
        "sum": sum(values) / (ranks if sync else len(states)),
        "min": min(values),
        "max": max(values),
    }
    return {**merged, "read": [folds[op]], "read_weights": [mass / share]}


def _divided(metric: Any, name: str, saved: Sequence[Mapping[str, Any]], rank: int) -> dict[str, Any]:
    """Return what this rank has of a torchmetrics object that other ranks filled: reduced, it comes to the same.

    Sums and lists go to the first rank; the others begin with none. What is the same however often it is reduced (the
    largest, the smallest, a mean) goes to all.

    Raises:
        CheckpointError: if torchmetrics has no reduction for a state: its `compute` wants one for each rank.
    """
    state: dict[str, Any] = {}
    for key, reduction in metric._reductions.items():
        values = [other["state"][key] for other in saved]
        if isinstance(values[0], list):
            reduced: Any = [part for value in values for part in value]
        elif reduction is None:
            fix = f"trainer.fit(model, ckpt_path='...') on {len(saved)} processes, or load=('module', 'optimizers')"
            message = explain(
                f"a reduction for {key!r} of {type(metric).__name__} {name!r}", "dist_reduce_fx=None", fix
            )
            raise CheckpointError(message)
        else:
            reduced = reduction(torch.stack(values))
        shared = not isinstance(reduced, list) and torch.equal(reduction(torch.stack([reduced, reduced])), reduced)
        state[key] = reduced if rank == 0 or shared else copy.deepcopy(metric._defaults[key])
    return {"state": state, "count": sum(other["count"] for other in saved)}


def _set_accumulated(metric: Any, saved: Mapping[str, Any]) -> None:
    for name, value in saved["state"].items():
        present = getattr(metric, name)
        device = present.device if isinstance(present, Tensor) else metric.device
        moved = [v.to(device) for v in value] if isinstance(value, list) else value.to(device)
        setattr(metric, name, moved)
    metric._update_count, metric._computed = saved["count"], None
