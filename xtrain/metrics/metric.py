"""One logged metric: which settings it may have, what happens to its values until they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xtrain.errors import ConfigurationError, explain
from xtrain.metrics.checks import Settings, check_name, check_switches, check_value
from xtrain.metrics.objects import unite

if TYPE_CHECKING:
    from xtrain.collectives import Collectives, ReduceOp

_STEP_HOOKS = frozenset({"training_step", "on_train_batch_start", "on_train_batch_end"})
_EVALUATION_HOOKS = frozenset(
    {"validation_step", "on_validation_batch_start", "on_validation_batch_end"}
    | {"test_step", "on_test_batch_start", "on_test_batch_end"}
)
_EPOCH_HOOKS = frozenset(
    {"on_train_start", "on_train_epoch_start", "on_train_epoch_end"}
    | {"on_validation_start", "on_validation_epoch_start", "on_validation_epoch_end"}
    | {"on_test_start", "on_test_epoch_start", "on_test_epoch_end"}
)
INNER_HOOKS = frozenset(
    {"on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"}
    | {"configure_gradient_clipping"}
)

_REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda values, weights: (values * weights).sum() / weights.sum(),
    "sum": lambda values, weights: values.sum(),
    "min": lambda values, weights: values.amin(),
    "max": lambda values, weights: values.amax(),
}
_SPELLINGS: dict[Any, ReduceOp] = {
    "mean": "mean", "avg": "mean", torch.mean: "mean",
    "sum": "sum", torch.sum: "sum", sum: "sum",
    "min": "min", torch.min: "min", min: "min",
    "max": "max", torch.max: "max", max: "max",
}  # fmt: skip


@dataclass(slots=True, eq=False)
class Metric:
    """One name logged in one hook during one epoch: its settings, resolved, and its values.

    Attributes:
        settings: as given by the user, to notice a change.
        name: the user's name for it, with the suffix of the evaluation loader.
        key: what the ranks match it by: its name, and the hook where that is none of the steps.
        step_name: name of its step values.
        epoch_name: name of its epoch value.
        shown_early: `callback_metrics` has it before the epoch is reduced.
        op: how an epoch is reduced.
        sync: reduce over the ranks too.
        shared: there are other ranks to reduce over.
        dataloader: index of the evaluation loader, None if there is only one.
        latest: the newest value, where it was logged; `fresh` until it was read.
        source: a torchmetrics object, which accumulates by itself; `stale` once it was computed.
        result: value of the epoch, once reduced.
    """

    settings: Settings
    prog_bar: bool
    logger: bool
    name: str
    key: str
    step_name: str
    epoch_name: str
    on_step: bool
    on_epoch: bool
    shown_early: bool
    op: ReduceOp | Callable[[Tensor], Any]
    sync: bool
    dataloader: int | None
    shared: bool = False
    latest: Tensor | float | None = None
    fresh: bool = False
    source: Any = None
    stale: bool = False
    waiting: list[Tensor | float] = field(default_factory=list)
    waiting_weights: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    read_weights: list[float] = field(default_factory=list)
    result: float | None = None

    def filled(self, values: Mapping[str, Any]) -> Metric:
        """Return this metric with the values of an earlier one, given by the names of the attributes above."""
        for key, value in values.items():
            setattr(self, key, list(value) if isinstance(value, list) else value)
        return self

    def unread(self) -> list[Tensor | float]:
        """Return what the next read must bring to the host: the epoch's values, the newest one last."""
        if self.on_step and self.fresh and self.latest is not None and (self.source is not None or not self.waiting):
            return [*self.waiting, self.latest]
        return self.waiting

    def receive(self, floats: list[float]) -> None:
        """Take the values of `unread` as floats and fold those of the epoch into one (value, weight)."""
        if self.on_step and self.fresh:
            self.latest = floats[-1]  # whoever looks at it later waits for nothing
        self.fresh = False
        if not self.waiting:
            return
        self.read += floats[: len(self.waiting)]
        self.read_weights += self.waiting_weights
        self.waiting, self.waiting_weights, self.result = [], [], None
        if isinstance(self.op, str) and len(self.read) > 1:
            values, weights = (torch.tensor(x, dtype=torch.float64) for x in (self.read, self.read_weights))
            self.read, self.read_weights = [_REDUCTIONS[self.op](values, weights).item()], [weights.sum().item()]

    def reduce(self) -> float:
        """Return the value of the epoch on this rank."""
        return self.read[0] if isinstance(self.op, str) else _applied(self.name, self.op, torch.tensor(self.read))

    def take_source(self, source: Any, ranks: Collectives) -> None:
        """Remember a torchmetrics object, and what its forward returned in this step, or what its updates come to."""
        if self.source is not source:
            unite(source, ranks)
        self.source, self.stale, self.shared = source, False, False  # it reduces over the ranks by itself
        if not self.on_step:
            return
        value = getattr(source, "_forward_cache", None)
        value = source.compute() if value is None else value
        check_value(self.name, value)
        self.latest, self.fresh = snapshot(value) if isinstance(value, Tensor) else value, True

    def compute_source(self) -> None:
        """Let a torchmetrics object reduce its epoch; the result still waits to be read."""
        if self.source is not None and self.on_epoch and not self.stale:
            value = self.source.compute()
            check_value(self.name, value)
            self.waiting, self.waiting_weights = [value], [1.0]
            self.read, self.read_weights, self.stale = [], [], True

    def end_epoch(self) -> None:
        """Forget the epoch; a step value that was not read yet stays."""
        self.read, self.read_weights, self.result, self.source = [], [], None, None


def new_metric(name: str, stage: str, hook: str, dataloader: int | None, settings: Settings) -> Metric:
    """Return an empty metric, its settings resolved as its hook wants them.

    Raises:
        ConfigurationError: if nothing may be logged in `hook`, or not with these settings.
    """
    on_step, on_epoch, sync_dist = settings.on_step, settings.on_epoch, settings.sync_dist
    check_name(name, settings.add_dataloader_idx)
    check_switches(name, settings)
    if stage == "idle" or hook not in _STEP_HOOKS | _EVALUATION_HOOKS | _EPOCH_HOOKS:
        where = f"in {hook}" if hook else "outside of the hooks of fit, validate and test"
        expected = "self.log in a hook of a training, validation or test epoch, such as training_step"
        raise ConfigurationError(explain(expected, f"self.log({name!r}, ...) {where}", "log it in on_train_epoch_end"))
    on_step = hook in _STEP_HOOKS if on_step is None else on_step
    on_epoch = hook not in _STEP_HOOKS if on_epoch is None else on_epoch
    _check_levels(name, hook, on_step, on_epoch)
    suffix = "" if dataloader is None or not settings.add_dataloader_idx else f"/dataloader_idx_{dataloader}"
    forked = on_step and on_epoch
    return Metric(
        settings=settings,
        prog_bar=settings.prog_bar,
        logger=settings.logger,
        name=name + suffix,
        key=name + suffix if hook.endswith("_step") else f"{name}{suffix} in {hook}",
        step_name=f"{name}_step{suffix}" if forked else name + suffix,
        epoch_name=f"{name}_epoch{suffix}" if forked else name + suffix,
        on_step=on_step,
        on_epoch=on_epoch,
        shown_early=on_step or hook.endswith("_epoch_end"),
        op=_check_reduction(name, settings.reduce_fx, sync_dist),
        sync=sync_dist and not settings.rank_zero_only,
        dataloader=dataloader,
    )


def _check_levels(name: str, hook: str, on_step: bool, on_epoch: bool) -> None:
    received = f"self.log({name!r}, ..., on_step={on_step}, on_epoch={on_epoch}) in {hook}"
    if hook in _EPOCH_HOOKS and (on_step or not on_epoch):
        expected = "on_step=False and on_epoch=True in a hook that runs once per epoch"
        raise ConfigurationError(explain(expected, received, f"self.log({name!r}, value)"))
    if not (on_step or on_epoch):
        expected = "at least one of on_step and on_epoch"
        raise ConfigurationError(explain(expected, received, f"self.log({name!r}, value, on_step=True)"))


def _check_reduction(name: str, reduce_fx: Any, sync_dist: bool) -> ReduceOp | Callable[[Tensor], Any]:
    spelled = reduce_fx.lower() if isinstance(reduce_fx, str) else reduce_fx
    op = _SPELLINGS.get(spelled) if isinstance(spelled, str) or callable(spelled) else None
    if op is not None:
        return op
    if callable(reduce_fx) and not sync_dist:
        return reduce_fx  # type: ignore[no-any-return]
    expected = "reduce_fx out of 'mean', 'sum', 'min', 'max'" + ("" if sync_dist else ", or a function of a tensor")
    received = f"reduce_fx={reduce_fx!r}" + (" with sync_dist=True" if sync_dist else "")
    raise ConfigurationError(explain(expected, received, f"self.log({name!r}, value, reduce_fx='mean')"))


def snapshot(value: Tensor) -> Tensor:
    """Return `value` without its graph, safe from later changes in place.

    The result of an operation is fresh at every step, so sharing its memory is safe. A parameter or a
    buffer that was ever changed in place will be changed again, and is copied. Tensors made in
    inference mode have no version to tell, and are copied too.
    """
    lasting = value.is_inference() or value._version > 0
    if value.requires_grad:
        lasting = lasting or value.is_leaf
        value = value.detach()
    return value.clone() if lasting else value


def _applied(name: str, function: Callable[[Tensor], Any], values: Tensor) -> float:
    result = function(values)
    check_value(name, result)
    return float(result)


def is_torchmetric(value: Any) -> bool:
    """Return whether `value` accumulates by itself, as the objects of the torchmetrics package do."""
    return all(callable(getattr(value, method, None)) for method in ("update", "compute", "reset", "forward"))


class NotReducedError(ConfigurationError, KeyError):
    """A value that ranks reduce was read before they did; a KeyError too, as for any metric that is not there yet."""

    __str__ = Exception.__str__


class TensorView(MutableMapping[str, Tensor]):
    """A view of metrics as 0-dim tensors. Looking at it waits for no device; a value may be set.

    Args:
        values: what it shows.
        unreduced: names that are known, and have no value before the ranks reduce them.
    """

    def __init__(self, values: dict[str, Metric | float], unreduced: Mapping[str, Metric] | None = None) -> None:
        self._values, self._unreduced = values, {} if unreduced is None else unreduced

    def __getitem__(self, name: str) -> Tensor:
        if name in self._unreduced and name not in self._values:
            expected = f"{name!r} after it was reduced over the ranks, at a log point or at the end of an epoch"
            fix = "self.all_gather(value).mean() in the step, or Trainer(log_every_n_steps=1) and the value of before"
            raise NotReducedError(explain(expected, "a look at it before", fix))
        value = self._values[name]
        latest = value.latest if isinstance(value, Metric) else value
        return latest.reshape(()) if isinstance(latest, Tensor) else torch.tensor(latest, dtype=torch.float32)

    def __setitem__(self, name: str, value: Tensor | float) -> None:
        self._values[name] = float(value)

    def __delitem__(self, name: str) -> None:
        del self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(dict(self))
