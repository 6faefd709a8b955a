"""`RichProgressBar`: the progress bar drawn by the package rich."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xtrain.callbacks.progress import ProgressBar
from xtrain.errors import MissingDependencyError

_SECONDS = 0.1


@dataclass
class RichProgressBarTheme:
    """Colours of a `RichProgressBar`, each a style of rich; an empty one is rich's own.

    Attributes:
        description: of the title.
        progress_bar: of the bar.
        progress_bar_finished: of the bar at its end.
        progress_bar_pulse: of the bar of a loader that does not know its length.
        batch_progress: of the number of batches.
        time: of the time left.
        processing_speed: of a column that Lightning has, and this bar has not.
        metrics: of the metrics.
        metrics_text_delimiter: what stands between them.
        metrics_format: how their values are written.
    """

    description: Any = ""
    progress_bar: Any = ""
    progress_bar_finished: Any = ""
    progress_bar_pulse: Any = ""
    batch_progress: Any = ""
    time: Any = ""
    processing_speed: Any = ""
    metrics: Any = ""
    metrics_text_delimiter: str = ", "
    metrics_format: str = ".3g"

    def styles(self) -> dict[str, Any]:
        """Return the styles that are set, by the names that rich's columns have for them."""
        names = {
            "bar.complete": self.progress_bar,
            "bar.finished": self.progress_bar_finished,
            "bar.pulse": self.progress_bar_pulse,
            "progress.download": self.batch_progress,
            "progress.remaining": self.time,
        }
        return {name: style for name, style in names.items() if style}


class RichProgressBar(ProgressBar):
    """Shows what `ProgressBar` shows, with colours, by the package rich.

    Args:
        refresh_rate: batches between two looks at the clock; 0 shows nothing.
        leave: keep a line for each finished epoch above the bar.
        theme: its colours.
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
        theme: RichProgressBarTheme | None = None,
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
        self.theme = RichProgressBarTheme() if theme is None else theme
        self._console = {"stderr": True, **(console_kwargs or {})}

    def print(self, text: str) -> None:
        """Write `text` above the bars."""
        if self._display is None:
            super().print(text)
        else:
            self._display.console.print(text, markup=False, highlight=False)

    def _make(self, title: str, total: int | None, leave: bool, done: int) -> Any:
        from rich.console import Console
        from rich.theme import Theme

        if self._display is None:
            console = Console(**{"theme": Theme(self.theme.styles()), **self._console})
            if not (console.is_terminal or console.is_jupyter) and sys.stderr is console.file:
                return super()._make(title, total, leave, done)
            rich = self._rich
            columns = (
                rich.TextColumn("{task.description}", style=self.theme.description or "none"),
                rich.BarColumn(),
                rich.MofNCompleteColumn(),
                rich.TimeRemainingColumn(),
                rich.TextColumn("{task.fields[metrics]}", style=self.theme.metrics or "none", markup=False),
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
            else self._owner.theme.metrics_text_delimiter.join(
                f"{name}={value if isinstance(value, str) else format(value, self._owner.theme.metrics_format)}"
                for name, value in metrics.items()
            )
        )
        self._display.update(self._task, completed=self.done, metrics=self._text)
        self._display.refresh()

    def keep(self) -> None:
        self._display.console.print(f"{self._title} {self.done} {self._text}", markup=False, highlight=False)

    def close(self, metrics: Mapping[str, Any]) -> None:
        self.draw(metrics)
        self._owner.finished(self._task, self._leave)
