"""One recorded step: its operations, and what it did beside them; and how both are done again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from xtrain.compiled.known import Counters, Known, Outputs, Slot
from xtrain.compiled.optimizers import Rates, made_of_tensors
from xtrain.compiled.overflows import Overflows
from xtrain.compiled.questions import WatchedInt
from xtrain.compiled.recording import Problem, Recorder, Recording
from xtrain.compiled.watching import Watch, watched
from xtrain.metrics.metric import snapshot
from xtrain.run.state import Run
from xtrain.tensors import map_tensors

_PLAIN = (bool, int, float, str, bytes, type(None))


@dataclass
class Recorded:
    """A step that ran, with all that a replay needs.

    Attributes:
        recording: the operations; their outputs are numbered.
        watch: what Python read and wrote.
        sources: how each input is found again: a fixed tensor, the number of a tensor of the batch, or the
            parameter whose gradient it is.
        losses: outputs that ``manual_backward`` was given.
        logs: what was logged: values by name (a `_Slot` where an output is meant), settings, batch size.
        returned: what the step returned, with slots in the place of tensors.
        gradients: parameters that have a new gradient after the step, and which output it is; None has none.
        attributes: what the module's attributes are set to.
        counters: what became of the optimizers and of the run.
        overflows: what became of the steps that an overflow would skip.
        fresh: whether tensors were made that later steps use, as the first step of an optimizer does.
    """

    recording: Recording
    watch: Watch
    sources: list[tuple[str, Any]]
    losses: list[int]
    logs: list[tuple[dict[str, Any], Any, Any]]
    returned: Any
    gradients: list[tuple[Tensor, int | None]]
    attributes: list[tuple[dict[str, Any], str, Any]]
    counters: list[tuple[Any, dict[str, Any]]]
    overflows: Overflows
    fresh: bool

    @property
    def problems(self) -> list[Problem]:
        """What a replay would miss."""
        return [*self.recording.problems, *self.watch.problems]

    def difference(self, other: Recorded) -> str | None:
        """Return in what another recording of the same step differs, or None."""
        found = self.recording.difference(other.recording)
        if found is not None:
            return found
        for what, ours, theirs in (
            ("what was logged", self.logs, other.logs),
            ("what was returned", _shown(self.returned), _shown(other.returned)),
            ("the losses", self.losses, other.losses),
            ("attributes", self._attributes(), other._attributes()),
            ("gradients", [g for _, g in self.gradients], [g for _, g in other.gradients]),
            ("schedulers", list(map(id, self.watch.scheduled)), list(map(id, other.watch.scheduled))),
            ("counters", [c for _, c in self.counters], [c for _, c in other.counters]),
        ):
            if ours != theirs:
                return f"{what}: {theirs!r:.120}, and was {ours!r:.120}"
        return None

    def returned_slots(self) -> list[Slot]:
        """Return the outputs among what the step returned."""
        found: list[Slot] = []
        _collect(self.returned, found)
        return found

    def _attributes(self) -> list[tuple[str, Any]]:
        return [(name, None if callable(value) else value) for _, name, value in self.attributes]


def _collect(value: Any, found: list[Slot]) -> None:
    if isinstance(value, Slot):
        found.append(value)
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            _collect(item, found)


def _shown(value: Any) -> str:
    return repr(value)


def record(run: Run, training_step: Callable[..., Any], batch: Any, tensors: Sequence[Tensor], rates: Rates) -> Any:
    """Run one training step for real and write it down.

    Args:
        run: whose step it is.
        training_step: takes ``(batch, batch_idx)``.
        batch: for it.
        tensors: those of the batch.
        rates: the learning rates as tensors.

    Returns:
        What the step returned, and its `Recorded`.
    """
    known = Known(run, tensors, rates)
    counters = Counters(run)
    outputs = Outputs()
    raw = [o.optimizer for o in run.life.optimizers]
    recorder = Recorder(known.names)
    rates.refresh()
    rates.late = False
    with made_of_tensors(raw, rates), watched(run) as watch, _listening(run) as (losses, logs):
        overflows = Overflows(run, watch)
        index = WatchedInt(vars(run.trainer.progress)["batch_idx"], lambda p: p.batch_idx, watch.answers)
        with overflows.on_device(), recorder:
            returned = training_step(batch, index)
            kept = _Kept(run, rates, outputs, losses, logs, watch)
    returned_slots = map_tensors(outputs.slot, returned)
    gradients = known.new_gradients(outputs)
    attributes = kept.attributes(outputs)
    overflows.keep(outputs)
    recording = recorder.finish(outputs.tensors)
    for values, settings, size in logs:
        run.metrics._record({name: _plain(value) for name, value in values.items()}, settings, size)
    if rates.late:
        watch.problems.append(_LATE_RATE)
    recorded = Recorded(
        recording,
        watch,
        [known.source(tensor) for tensor in recording.inputs],
        kept.losses,
        kept.logs,
        returned_slots,
        gradients,
        attributes,
        counters.changes(),
        overflows,
        known.changed(),
    )
    overflows.settle()
    return returned, recorded


_LATE_RATE = Problem("a learning rate was changed before the optimizer stepped", "scheduler.step() after opt.step()")


def _plain(value: Any) -> Any:
    return value.plain if isinstance(value, WatchedInt) else value


@contextmanager
def _listening(run: Run) -> Any:
    """Collect the losses and what is logged, instead of reading them at once."""
    losses: list[Tensor] = []
    logs: list[tuple[dict[str, Any], Any, Any]] = []
    life, metrics = run.life, run.metrics
    asynchronous, last = life._asynchronous, life.last_loss
    life._asynchronous = True
    life.hooks["on_before_backward"].append(losses.append)

    def note(values: Any, settings: Any, batch_size: Any) -> None:
        safe = {k: snapshot(v) if isinstance(v, Tensor) else v for k, v in values.items()}
        logs.append((safe, settings, batch_size))

    vars(metrics)["_record"] = note
    try:
        yield losses, logs
    finally:
        del vars(metrics)["_record"]
        life.hooks["on_before_backward"].remove(losses.append)
        life._asynchronous = asynchronous
        if not asynchronous:
            life.last_loss = last
            for loss in losses:
                if life._nonfinite_loss != "ignore" and loss.numel() == 1:
                    life.check_finite(loss.item())


class _Kept:
    """What a replay gives out again: losses, logged values, attributes."""

    def __init__(self, run: Run, rates: Rates, outputs: Outputs, losses: Any, logs: Any, watch: Watch) -> None:
        self.losses = [outputs.slot(loss.detach()).number for loss in losses if loss.numel() == 1]
        self._watch, self._groups, self._outputs = watch, rates.groups, outputs
        self.logs = [({k: self._logged(k, v) for k, v in values.items()}, s, size) for values, s, size in logs]

    def _logged(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._outputs.slot(value)
        if isinstance(value, WatchedInt):
            return value.expression
        for index, group in enumerate(self._groups):
            if value is group["lr"]:
                return Rate(index)
        if not any(value is known for _, _, known in self._watch.guards):
            what = f"self.log({name!r}, ...) was given a {type(value).__name__} that Python computed"
            self._watch.problems.append(Problem(what, "log a tensor, or log it in on_train_batch_end"))
        return value

    def attributes(self, outputs: Outputs) -> list[tuple[dict[str, Any], str, Any]]:
        """Return what attributes are set to: an output, a plain value, or what follows from the place."""
        found: list[tuple[dict[str, Any], str, Any]] = []
        for space, name, value in self._watch.written.values():
            if isinstance(value, Tensor):
                found.append((space, name, outputs.slot(value)))
            elif isinstance(value, WatchedInt):
                found.append((space, name, value.expression))
                space[name] = value.plain
            else:
                found.append((space, name, value))
        return found


@dataclass(frozen=True)
class Rate:
    """Stands for the learning rate of a group."""

    index: int
