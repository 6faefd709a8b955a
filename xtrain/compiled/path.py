"""A path: one way through the training step, recorded twice, compiled once, and replayed where it is right."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from xtrain.compiled.building import Replay
from xtrain.compiled.known import Slot, apply_counters, flags_of
from xtrain.compiled.optimizers import Rates
from xtrain.compiled.recorded import Rate, Recorded
from xtrain.compiled.watching import PLAIN, fingerprint
from xtrain.run.state import Run

TRIALS = 20
"""Replays, and eager steps, after which the slower of both is dropped."""


class Path:
    """One way through the step.

    Args:
        recorded: its first recording.
        run: whose step it is.
        rates: the learning rates as tensors.

    Attributes:
        recorded: its latest recording.
        replay: the compiled operations, once there are any.
        reason: why it runs eagerly for good, empty if it does not.
    """

    def __init__(self, recorded: Recorded, run: Run, rates: Rates) -> None:
        self.recorded, self._run, self._rates = recorded, run, rates
        self.replay: Replay | None = None
        self.reason = ""
        self.times: dict[str, list[float]] = {"replay": [], "eager": []}
        self.decided = False
        groups = [group for o in run.life.optimizers for group in o.optimizer.param_groups]
        settings = [(g, k, v) for g in groups for k, v in g.items() if k not in ("lr", "params", "initial_lr")]
        self._guards = [*recorded.watch.guards, *settings]

    def holds(self) -> bool:
        """Return whether a step at this place would go this way, as far as Python has asked."""
        for space, name, value in self._guards:
            found = space.get(name, self)
            if found is not value and (type(value) not in PLAIN or type(found) is not type(value) or found != value):
                return False
        if not self.reason and any(fingerprint(value) != before for value, before in self.recorded.watch.containers):
            return False
        return self.recorded.watch.answers.hold(self._run.trainer.progress)

    def use(self, replay: Replay) -> None:
        """Replay with `replay` from now on."""
        self.replay = replay
        sources = self.recorded.sources
        self._inputs: list[Any] = [source if kind == "fixed" else None for kind, source in sources]
        self._of_batch = [(i, source) for i, (kind, source) in enumerate(sources) if kind == "batch"]
        self._of_flags = [(i, source) for i, (kind, source) in enumerate(sources) if kind == "overflow"]
        self._of_gradients = [(i, source) for i, (kind, source) in enumerate(sources) if kind == "gradient"]

    def run(self, tensors: list[Tensor]) -> Any:
        """Make the step that was recorded again, on the tensors of another batch; return what it returns."""
        assert self.replay is not None
        recorded, inputs, run = self.recorded, self._inputs, self._run
        for position, index in self._of_batch:
            inputs[position] = tensors[index]
        for position, parameter in self._of_gradients:
            inputs[position] = parameter.grad
        flags = dict(flags_of(run)) if self._of_flags else {}
        for position, (optimizer, place) in self._of_flags:
            inputs[position] = flags[optimizer][place]
        self._rates.refresh()
        with torch.no_grad():
            out = self.replay(*inputs)
        for position, _ in (*self._of_batch, *self._of_gradients, *self._of_flags):
            inputs[position] = None  # nobody keeps a batch alive
        for parameter, number in recorded.gradients:
            parameter.grad = None if number is None else out[number]
        for space, name, value in recorded.attributes:
            space[name] = self._value(value, out)
        apply_counters(recorded.counters)
        recorded.overflows.replayed(out)
        for scheduler in recorded.watch.scheduled:
            scheduler.step()
        for values, settings, size in recorded.logs:
            run.metrics._record({name: self._value(v, out) for name, v in values.items()}, settings, size)
        self._check([out[number] for number in recorded.losses])
        return map_slots(recorded.returned, out)

    def _value(self, value: Any, out: list[Tensor]) -> Any:
        if type(value) is Slot:
            return out[value.number]
        if type(value) is Rate:
            return self._rates.groups[value.index]["lr"]
        return value(self._run.trainer.progress) if callable(value) else value

    def _check(self, losses: list[Tensor]) -> None:
        life = self._run.life
        if life._nonfinite_loss == "ignore" or not losses:
            return
        if life._asynchronous:
            life.last_loss = losses[-1]
        else:
            for loss in losses:
                life.check_finite(loss.item())

    # ---------------------------------------------------------------- which is faster

    def timed(self, kind: str, step: Callable[[], Any]) -> Any:
        """Run ``step()`` and note how long it took."""
        self._wait()
        start = time.perf_counter()
        result = step()
        self._wait()
        self.times[kind].append(time.perf_counter() - start)
        self.decided = all(len(times) >= TRIALS for times in self.times.values())
        return result

    def _wait(self) -> None:
        if self._run.backend.capabilities.asynchronous:
            torch.accelerator.synchronize()

    @property
    def next_kind(self) -> str:
        """Which of both is to be timed now."""
        return "eager" if len(self.times["eager"]) < len(self.times["replay"]) else "replay"

    @property
    def ratio(self) -> float:
        """Time of a replay over that of an eager step; NaN before both were timed."""
        if not all(self.times.values()):
            return float("nan")
        return median(self.times["replay"]) / median(self.times["eager"])


def map_slots(value: Any, out: list[Tensor]) -> Any:
    """Return nested data with outputs in the place of slots."""
    if type(value) is Slot:
        return out[value.number]
    if isinstance(value, dict):
        return {key: map_slots(item, out) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_slots(item, out) for item in value)
    return value
