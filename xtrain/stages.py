"""What a Trainer is doing, as strings that are also members of an Enum, named as in Lightning."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class _Text(str, Enum):
    """Members are their values wherever a str is expected."""

    def __str__(self) -> str:
        return str(self.value)

    def __format__(self, format_spec: str) -> str:
        return format(self.value, format_spec)


class TrainerFn(_Text):
    """What was called: the `stage` that ``setup`` and ``teardown`` get."""

    FITTING = "fit"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"


class TrainerStatus(_Text):
    """How a call stands, or ended."""

    INITIALIZING = "initializing"
    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"


class RunningStage(_Text):
    """Which loop runs."""

    TRAINING = "train"
    SANITY_CHECKING = "sanity_check"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"


@dataclass
class TrainerState:
    """What ``trainer.state`` tells.

    Attributes:
        status: how the current or last call stands.
        fn: what was called; None before the first call.
        stage: which loop runs; None between runs.
    """

    status: TrainerStatus = TrainerStatus.INITIALIZING
    fn: TrainerFn | None = None
    stage: RunningStage | None = None

    @property
    def finished(self) -> bool:
        """Whether the last call ended as it should."""
        return self.status is TrainerStatus.FINISHED

    @property
    def stopped(self) -> bool:
        """Whether the last call has ended, in whichever way."""
        return self.status in (TrainerStatus.FINISHED, TrainerStatus.INTERRUPTED)
