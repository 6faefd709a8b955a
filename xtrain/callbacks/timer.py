"""`Timer`: end a training after some time, and tell how long each stage took."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from xtrain.callbacks.base import Callback
from xtrain.errors import ConfigurationError, explain

if TYPE_CHECKING:
    from xtrain.module import LightningModule
    from xtrain.trainer import Trainer

_SECONDS_BETWEEN_QUESTIONS = 1.0  # ranks agree about the time by a collective: about one a second
_MOST_STEPS_BETWEEN = 1000


class Timer(Callback):
    """Measures training, validation and testing, and ends the training when its time is used up.

    On several ranks all of them stop after the same step: about once a second they agree on the
    time that is left.

    Args:
        duration: how long to train: ``"DD:HH:MM:SS"``, a `timedelta`, a dict of its arguments, or None.
        interval: ``"step"`` ends in the middle of an epoch, ``"epoch"`` at its end.
        verbose: say that the time is used up.

    Raises:
        ConfigurationError: for a duration or an interval that is not understood.

    Example:
        >>> trainer = Trainer(callbacks=[Timer("00:11:30:00")])
    """

    def __init__(
        self,
        duration: str | timedelta | dict[str, float] | None = None,
        interval: str = "step",
        verbose: bool = True,
    ) -> None:
        if interval not in ("step", "epoch"):
            raise ConfigurationError(explain("interval 'step' or 'epoch'", repr(interval), "Timer(interval='step')"))
        self._duration = None if duration is None else read_duration(duration).total_seconds()
        self._interval, self._verbose = interval, verbose
        self._started: dict[str, float] = {}
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._steps_left = 0  # until the ranks agree again
        self._steps, self._asked = 0, 0.0

    # ---------------------------------------------------------------- what users ask

    def time_elapsed(self, stage: str = "train") -> float:
        """Return the seconds spent in ``"train"``, ``"validate"`` or ``"test"``."""
        running = time.monotonic() - self._started[stage] if stage in self._started else 0.0
        return self._spent[stage] + running

    def time_remaining(self, stage: str = "train") -> float | None:
        """Return the seconds left, None without a duration."""
        return None if self._duration is None else self._duration - self.time_elapsed(stage)

    # ---------------------------------------------------------------- when

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Start the clock of training."""
        self._start("train")
        self._steps, self._steps_left, self._asked = 0, 1, time.monotonic()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop it."""
        self._stop("train")

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the clock after a step."""
        if self._duration is None or self._interval != "step":
            return
        if trainer.world_size == 1:
            self._end_if(trainer, self._duration - self.time_elapsed())
            return
        self._steps += 1
        self._steps_left -= 1
        if self._steps_left == 0:
            self._end_if(trainer, self._agree(trainer))

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Look at the clock after an epoch."""
        if self._duration is not None:
            remaining = self._duration - self.time_elapsed()
            self._end_if(trainer, remaining if trainer.world_size == 1 else self._lowest(trainer, remaining)[0])

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Start the clock of validation."""
        self._start("validate")

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop it."""
        self._stop("validate")

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Start the clock of testing."""
        self._start("test")

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop it."""
        self._stop("test")

    # ---------------------------------------------------------------- how

    def _start(self, stage: str) -> None:
        self._started[stage] = time.monotonic()

    def _stop(self, stage: str) -> None:
        if stage in self._started:
            self._spent[stage] += time.monotonic() - self._started.pop(stage)

    def _agree(self, trainer: Trainer) -> float:
        """Return the time left to the rank that has least, and choose the step after which to ask again."""
        assert self._duration is not None
        per_step = (time.monotonic() - self._asked) / self._steps
        remaining, slowest = self._lowest(trainer, self._duration - self.time_elapsed(), -per_step)
        self._steps_left = max(1, min(_MOST_STEPS_BETWEEN, int(_SECONDS_BETWEEN_QUESTIONS / max(-slowest, 1e-6))))
        self._steps, self._asked = 0, time.monotonic()
        return remaining

    def _lowest(self, trainer: Trainer, *values: float) -> list[float]:
        own = torch.tensor(values, device=trainer.backend.device)
        return trainer.backend.collectives.all_reduce(own, "min").tolist()

    def _end_if(self, trainer: Trainer, remaining: float) -> None:
        if remaining <= 0 and not trainer.should_stop:
            trainer.should_stop = True
            if self._verbose:
                spent = timedelta(seconds=round(self.time_elapsed()))
                trainer.print(f"Timer ends the training after {spent}, in epoch {trainer.current_epoch}.")

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds spent, those of a stage that runs included."""
        return {"time_elapsed": {stage: self.time_elapsed(stage) for stage in {*self._spent, *self._started}}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count the seconds that were spent before."""
        self._spent.update(state["time_elapsed"])


def read_duration(value: str | timedelta | dict[str, float]) -> timedelta:
    """Return a duration given as ``"DD:HH:MM:SS"``, as a `timedelta`, or as a dict of its arguments.

    Raises:
        ConfigurationError: for anything else, or no time at all.
    """
    duration = None
    if isinstance(value, timedelta):
        duration = value
    elif isinstance(value, str) and re.fullmatch(r"\d+(:\d\d?){3}", value.strip()):
        days, hours, minutes, seconds = map(int, value.split(":"))
        duration = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    elif isinstance(value, dict) and value.keys() <= {"weeks", "days", "hours", "minutes", "seconds"}:
        duration = timedelta(**value)
    if duration is None or duration <= timedelta(0):
        fix = "Trainer(max_time='00:12:00:00') or Trainer(max_time={'hours': 12})"
        raise ConfigurationError(explain("a time as 'DD:HH:MM:SS', a timedelta or a dict", repr(value), fix))
    return duration
