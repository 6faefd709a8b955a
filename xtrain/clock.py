"""A clock that the ranks of a run read alike: each has its own time, but all must do the same after the same step."""

from __future__ import annotations

import time

import torch

from xtrain.contract import Backend

_SECONDS_BETWEEN_QUESTIONS = 1.0  # ranks agree about the time by a collective: about one a second
_MOST_STEPS_BETWEEN = 1000


class SharedClock:
    """Lets the ranks agree about the time that is left, about once a second; one process asks nobody."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Start anew: the ranks agree after the next step."""
        self._steps, self._until, self._asked = 0, 1, time.monotonic()

    def after_step(self, backend: Backend, remaining: float) -> float | None:
        """Return the seconds left to the rank that has least; None if the ranks do not ask each other now.

        Args:
            backend: of the run; all ranks come here after the same steps.
            remaining: seconds that this rank has left.
        """
        if backend.collectives.world_size == 1:
            return remaining
        self._steps += 1
        self._until -= 1
        if self._until:
            return None
        per_step = (time.monotonic() - self._asked) / self._steps
        least, slowest = lowest(backend, remaining, -per_step)
        self._until = max(1, min(_MOST_STEPS_BETWEEN, int(_SECONDS_BETWEEN_QUESTIONS / max(-slowest, 1e-6))))
        self._steps, self._asked = 0, time.monotonic()
        return least


class Interval:
    """Tells whether some time has passed since it was last restarted, on all ranks alike.

    Args:
        seconds: the time.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._clock = seconds, SharedClock()
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self._since = time.monotonic()

    def is_over(self, backend: Backend) -> bool:
        """Whether the time has passed; to be asked once after each step, on every rank."""
        left = self._clock.after_step(backend, self._seconds - (time.monotonic() - self._since))
        return left is not None and left <= 0


def lowest(backend: Backend, *values: float) -> list[float]:
    """Return the lowest of each of the values over the ranks."""
    if backend.collectives.world_size == 1:
        return list(values)
    own = torch.tensor(values, device=backend.device)
    found: list[float] = backend.collectives.all_reduce(own, "min").tolist()
    return found
