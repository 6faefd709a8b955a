"""`Timer`: end a training after some time, and tell how long each stage took."""

from __future__ import annotations

import time
from collections import defaultdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from xtrain.callbacks.base import Callback
from xtrain.checks import read_duration
from xtrain.clock import SharedClock, lowest
from xtrain.errors import ConfigurationError, explain

if TYPE_CHECKING:
    from xtrain.module import LightningModule
    from xtrain.trainer import Trainer


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
        self._clock = SharedClock()

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
        self._clock.begin()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop it."""
        self._stop("train")

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the clock after a step."""
        if self._duration is None or self._interval != "step":
            return
        remaining = self._clock.after_step(trainer.backend, self._duration - self.time_elapsed())
        if remaining is not None:
            self._end_if(trainer, remaining)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Look at the clock after an epoch."""
        if self._duration is not None:
            self._end_if(trainer, lowest(trainer.backend, self._duration - self.time_elapsed())[0])

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
