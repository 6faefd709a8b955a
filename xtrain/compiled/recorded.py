"""One recorded step: its operations, and what it did beside them; and how both are done again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xtrain.compiled.optimizers import Rates, made_of_tensors
from xtrain.compiled.questions import WatchedInt
from xtrain.compiled.recording import Problem, Recorder, Recording
from xtrain.compiled.watching import Watch, watched
from xtrain.contract import Phase
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

    def _attributes(self) -> list[tuple[str, Any]]:
        return [(name, None if callable(value) else value) for _, name, value in self.attributes]


@dataclass(frozen=True)
class Slot:
    """Stands for an output of the operations."""

    number: int


@dataclass
class _Outputs:
    """The tensors that a step results in; each is an output once."""

    tensors: list[Tensor] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)

    def slot(self, tensor: Tensor) -> Slot:
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        return Slot(self._numbers[id(tensor)])


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
    known = _Known(run, tensors, rates)
    counters = _Counters(run)
    outputs = _Outputs()
    raw = [o.optimizer for o in run.life.optimizers]
    recorder = Recorder(known.names)
    rates.refresh()
    rates.late = False
    with made_of_tensors(raw, rates), watched(run) as watch, _listening(run) as (losses, logs):
        index = WatchedInt(vars(run.trainer.progress)["batch_idx"], lambda p: p.batch_idx, watch.answers)
        with recorder:
            returned = training_step(batch, index)
            kept = _Kept(run, rates, outputs, losses, logs, watch)
    returned_slots = map_tensors(outputs.slot, returned)
    gradients = known.new_gradients(outputs)
    attributes = kept.attributes(outputs)
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
        known.changed(),
    )
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

    def __init__(self, run: Run, rates: Rates, outputs: _Outputs, losses: Any, logs: Any, watch: Watch) -> None:
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

    def attributes(self, outputs: _Outputs) -> list[tuple[dict[str, Any], str, Any]]:
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


class _Known:
    """The tensors that exist before a step, and what they are."""

    def __init__(self, run: Run, batch: Sequence[Tensor], rates: Rates) -> None:
        self._run = run
        self.names: dict[int, str] = {}
        self._sources: dict[int, tuple[str, Any]] = {}
        self._lasting = self._lasting_tensors()
        for name, tensor in self._lasting.items():
            self._add(name, tensor, "fixed", tensor)
        for index, tensor in enumerate(rates.tensors):
            self._add(f"learning rate {index}", tensor, "fixed", tensor)
        self._before = {id(p): p.grad for p in self._parameters()}
        for index, parameter in enumerate(self._parameters()):
            if parameter.grad is not None:
                self._add(f"gradient {index}", parameter.grad, "gradient", parameter)
        for index, tensor in enumerate(batch):
            self._add(f"batch {index}", tensor, "batch", index)

    def _add(self, name: str, tensor: Tensor, kind: str, source: Any) -> None:
        self.names[id(tensor)] = name
        self._sources[id(tensor)] = (kind, source)

    def _parameters(self) -> list[Tensor]:
        owned = [p for o in self._run.life.optimizers for p in o.parameters]
        return list(dict.fromkeys([*self._run.module.parameters(), *owned]))

    def _lasting_tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {f"parameter {n}": t for n, t in self._run.module.named_parameters()}
        found |= {f"buffer {n}": t for n, t in self._run.module.named_buffers()}
        for index, optimizer in enumerate(self._run.life.optimizers):
            raw = optimizer.optimizer
            held = [p for group in raw.param_groups for p in group["params"]]
            found |= {f"parameter {position} of optimizer {index}": p for position, p in enumerate(held)
                      if not any(p is t for t in found.values())}  # fmt: skip
            for position, parameter in enumerate(held):
                for key, value in raw.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        found[f"{key} {position} of optimizer {index}"] = value
        return found

    def source(self, tensor: Tensor) -> tuple[str, Any]:
        """Return how `tensor` is found again; one that nobody knows stays what it is."""
        return self._sources.get(id(tensor), ("fixed", tensor))

    def new_gradients(self, outputs: _Outputs) -> list[tuple[Tensor, int | None]]:
        """Return the parameters whose gradient is another tensor than before the step, with its output."""
        found: list[tuple[Tensor, int | None]] = []
        for parameter in self._parameters():
            gradient = parameter.grad
            if gradient is not self._before[id(parameter)]:
                found.append((parameter, None if gradient is None else outputs.slot(gradient).number))
        return found

    def changed(self) -> bool:
        """Return whether parameters, buffers or states of optimizers are other tensors than before the step."""
        after = self._lasting_tensors()
        return after.keys() != self._lasting.keys() or any(after[n] is not t for n, t in self._lasting.items())


_NOT_NOW = -3  # where `zeroed_at` never is


class _Counters:
    """What a step changes in the wrapped optimizers and in the run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._global_step = run.trainer.progress.global_step
        self._before = [(o, o.step_count, o.zeroed_at) for o in run.life.optimizers]
        for optimizer in run.life.optimizers:
            optimizer.zeroed_at = _NOT_NOW

    def changes(self) -> list[tuple[Any, dict[str, Any]]]:
        """Return the changes: of each optimizer, and last those of the run."""
        run, found = self._run, []
        for optimizer, steps, zeroed_at in self._before:
            zeroed = None if optimizer.zeroed_at == _NOT_NOW else optimizer.zeroed_at - steps
            optimizer.zeroed_at = zeroed_at if zeroed is None else optimizer.zeroed_at
            after = {
                "phase": optimizer.phase,
                "steps": optimizer.step_count - steps,
                "zeroed": zeroed,
                "zeros": optimizer._zeros is not None,
            }
            found.append((optimizer, after))
        steps = int(run.trainer.progress.global_step) - self._global_step
        found.append((run, {"stepped": run.life.stepped, "window": run.window, "global_step": steps}))
        return found


def apply_counters(counters: list[tuple[Any, dict[str, Any]]]) -> None:
    """Make the changes of a recorded step again."""
    for optimizer, after in counters[:-1]:
        before = optimizer.step_count
        optimizer.phase, optimizer.applied = after["phase"], optimizer.applied or after["steps"] > 0
        optimizer.step_count = before + after["steps"]
        if after["zeroed"] is not None:
            optimizer.zeroed_at = before + after["zeroed"]
        if not after["zeros"]:
            optimizer._zeros = None
        elif after["phase"] is Phase.EMPTY:
            optimizer._zeros = optimizer._backend.gradient_versions(optimizer)
        else:
            optimizer._zeros = []
    run, after = counters[-1]
    run.life.stepped, run.window = run.life.stepped or after["stepped"], after["window"]
    run.trainer.progress.global_step += after["global_step"]


def state_of(run: Run) -> tuple[Any, ...]:
    """Return what decides, beside the batch and what Python asks, which operations a step makes."""
    optimizers = run.life.optimizers
    return (
        run.window,
        torch.is_grad_enabled(),
        [(o.phase, o._zeros is None) for o in optimizers],
        [m.training for m in run.module.modules()],
        [(p.requires_grad, p.grad is None) for p in run.module.parameters()],
    )
