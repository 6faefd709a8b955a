"""`RichProgressBar`: the progress bar drawn by the package rich."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from xtrain.callbacks.progress import ProgressBar
from xtrain.errors import MissingDependencyError

_SECONDS = 0.1


class RichProgressBar(ProgressBar):
    """Shows what `ProgressBar` shows, with colours, by the package rich.

    Args:
        refresh_seconds: time between two drawings; default: 0.1.
        leave: keep the bars of finished epochs on the screen.

    Raises:
        MissingDependencyError: if rich is not installed.

    Example:
        >>> trainer = Trainer(callbacks=[RichProgressBar()])
    """

    def __init__(self, refresh_seconds: float | None = None, leave: bool = True) -> None:
        super().__init__(refresh_seconds, leave)
        try:
            import rich.progress as rich
        except ImportError as error:
            text = "RichProgressBar needs the rich package: pip install 'xtrain-torch[rich]'"
            raise MissingDependencyError(text) from error
        self._rich: Any = rich
        self._display: Any = None

    def print(self, text: str) -> None:
        """Write `text` above the bars."""
        if self._display is None:
            print(text)
        else:
            self._display.console.print(text, markup=False, highlight=False)

    def _make(self, description: str, total: int | None, leave: bool) -> Any:
        if self._display is None:
            from rich.console import Console

            rich = self._rich
            columns = (
                "{task.description}",
                rich.BarColumn(),
                rich.MofNCompleteColumn(),
                rich.TimeRemainingColumn(),
                "{task.fields[metrics]}",
            )
            self._display = rich.Progress(*columns, console=Console(stderr=True), auto_refresh=False)
            self._display.start()
        return _Task(self, description, total, leave)

    def finished(self, task: Any, leave: bool) -> None:
        """Take a bar away, or leave it; with the last one the display ends."""
        if not leave:
            self._display.remove_task(task)
        if not self._bars:
            self._display.stop()
            self._display = None


class _Task:
    """One line of the display, with the interface of the other bars."""

    def __init__(self, owner: RichProgressBar, description: str, total: int | None, leave: bool) -> None:
        self._owner, self._display, self._leave = owner, owner._display, leave
        self._seconds = _SECONDS if owner._seconds is None else owner._seconds
        self._task = self._display.add_task(description, total=total, metrics="")
        self.done = 0
        self.due = time.monotonic() + self._seconds

    def draw(self, metrics: Mapping[str, Any]) -> None:
        self.due = time.monotonic() + self._seconds
        text = ", ".join(
            f"{name}={value if isinstance(value, str) else f'{value:.3g}'}" for name, value in metrics.items()
        )
        self._display.update(self._task, completed=self.done, metrics=text)
        self._display.refresh()

    def close(self, metrics: Mapping[str, float]) -> None:
        self.draw(metrics)
        self._owner.finished(self._task, self._leave)
