"""`RichProgressBar`: the progress bar drawn by the package rich."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from xtrain.callbacks.progress import ProgressBar
from xtrain.errors import MissingDependencyError

_SECONDS = 0.1


class RichProgressBar(ProgressBar):
    """Shows what `ProgressBar` shows, with colours, by the package rich.

    Args:
        refresh_rate: batches between two looks at the clock; 0 shows nothing.
        leave: keep a line for each finished epoch above the bar.
        console_kwargs: passed on to `rich.console.Console`; default: it writes to stderr.
        refresh_seconds: time between two drawings; default: 0.1.

    Raises:
        MissingDependencyError: if rich is not installed.

    Example:
        >>> trainer = Trainer(callbacks=[RichProgressBar(refresh_rate=10)])
    """

    def __init__(
        self,
        refresh_rate: int = 1,
        leave: bool = False,
        console_kwargs: Mapping[str, Any] | None = None,
        *,
        refresh_seconds: float | None = None,
    ) -> None:
        super().__init__(refresh_rate, leave=leave, refresh_seconds=refresh_seconds)
        try:
            import rich.progress as rich
        except ImportError as error:
            text = "RichProgressBar needs the rich package: pip install 'xtrain-torch[rich]'"
            raise MissingDependencyError(text) from error
        self._rich: Any = rich
        self._display: Any = None
        self._console = {"stderr": True, **(console_kwargs or {})}

    def print(self, text: str) -> None:
        """Write `text` above the bars."""
        if self._display is None:
            super().print(text)
        else:
            self._display.console.print(text, markup=False, highlight=False)

    def _make(self, title: str, total: int | None, leave: bool, done: int) -> Any:
        from rich.console import Console

        if self._display is None:
            console = Console(**self._console)
            if not (console.is_terminal or console.is_jupyter) and sys.stderr is console.file:
                return super()._make(title, total, leave, done)
            rich = self._rich
            columns = (
                "{task.description}",
                rich.BarColumn(),
                rich.MofNCompleteColumn(),
                rich.TimeRemainingColumn(),
                "{task.fields[metrics]}",
            )
            self._display = rich.Progress(*columns, console=console, auto_refresh=False)
            self._display.start()
        return _Task(self, title, total, leave, done)

    def finished(self, task: Any, leave: bool) -> None:
        """Take a bar away, or leave it; with the last one the display ends."""
        if not leave:
            self._display.remove_task(task)
        if not self._bars:
            self._display.stop()
            self._display = None


class _Task:
    """One line of the display, with the interface of the other bars."""

    def __init__(self, owner: RichProgressBar, title: str, total: int | None, leave: bool, done: int) -> None:
        self._owner, self._display, self._leave = owner, owner._display, leave
        self._seconds = _SECONDS if owner._seconds is None else owner._seconds
        self._task = self._display.add_task(title, total=total, completed=done, metrics="")
        self._title, self._text = title, ""
        self.done = done
        self.due = time.monotonic() + self._seconds

    def rename(self, title: str, total: int | None) -> None:
        self._title = title
        self._display.update(self._task, description=title, total=total)

    def draw(self, metrics: Mapping[str, Any] | str) -> None:
        self.due = time.monotonic() + self._seconds
        self._text = (
            metrics
            if isinstance(metrics, str)
            else ", ".join(
                f"{name}={value if isinstance(value, str) else f'{value:.3g}'}" for name, value in metrics.items()
            )
        )
        self._display.update(self._task, completed=self.done, metrics=self._text)
        self._display.refresh()

    def keep(self) -> None:
        self._display.console.print(f"{self._title} {self.done} {self._text}", markup=False, highlight=False)

    def close(self, metrics: Mapping[str, Any]) -> None:
        self.draw(metrics)
        self._owner.finished(self._task, self._leave)
