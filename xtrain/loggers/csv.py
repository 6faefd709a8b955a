"""Metrics as a CSV file, with nothing but the standard library."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xtrain.errors import ConfigurationError, explain
from xtrain.loggers.base import FileLogger, rank_zero_only


class CSVLogger(FileLogger):
    """Writes ``metrics.csv`` (and ``hparams.json``) to ``save_dir/name/version_N``.

    The file has one row per call and one column per metric, ``step`` first; columns may appear later.
    It is complete on disk after every `flush_logs_every_n_steps` rows, at the end of an epoch and at
    the end of the run: rows are appended, and a new column replaces the file in one move, so that a
    crash loses rows at most. In the folder of an earlier run it goes on where that one ended.

    Args:
        save_dir: the folder of all experiments.
        name: the experiment.
        version: an int N or the name of a folder; None takes the first N that is free.
        flush_logs_every_n_steps: rows kept in memory before they are written.

    Raises:
        ConfigurationError: if `flush_logs_every_n_steps` is below 1.

    Example:
        >>> logger = CSVLogger("logs")
        >>> logger.log_metrics({"loss": 0.5}, step=1)
        >>> logger.save()
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str = "lightning_logs",
        version: int | str | None = None,
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(save_dir, name, version)
        if flush_logs_every_n_steps < 1:
            received = f"flush_logs_every_n_steps={flush_logs_every_n_steps}"
            raise ConfigurationError(explain("a number of rows of at least 1", received, "CSVLogger('logs')"))
        self._keep = flush_logs_every_n_steps
        self._rows: list[dict[str, Any]] = []
        self._columns: list[str] | None = None  # those of the file; None: not looked at yet

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.log_dir) / "metrics.csv"

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row."""
        self._rows.append({"step": step, **metrics})
        if len(self._rows) >= self._keep:
            self.save()

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Write ``hparams.json``; what JSON cannot hold is written as text."""
        target = Path(self.log_dir) / "hparams.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(dict(params), indent=2, default=str) + "\n", encoding="utf-8")

    @rank_zero_only
    def save(self) -> None:
        """Bring the file up to date."""
        if not self._rows:
            return
        if self._columns is None:
            self._columns = self._open()
        names = dict.fromkeys(name for row in self._rows for name in row)
        new = [name for name in names if name not in self._columns]
        if new:
            self._widen(new)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(_format(self._columns, self._rows))
        self._rows = []

    def _open(self) -> list[str]:
        """Return the columns of an existing file, after cutting off a last line that a crash left torn."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return []
        text = self.path.read_bytes()
        if not text.endswith(b"\n"):
            with self.path.open("r+b") as file:
                file.truncate(text.rfind(b"\n") + 1)
        with self.path.open(newline="", encoding="utf-8") as file:
            return next(csv.reader(file), [])

    def _widen(self, new: list[str]) -> None:
        """Rewrite the file with more columns."""
        assert self._columns is not None
        rows: list[dict[str, Any]] = []
        if self._columns:
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        self._columns += new
        draft = self.path.with_suffix(".new")
        with draft.open("w", newline="", encoding="utf-8") as file:
            file.write(_format(self._columns, [dict(zip(self._columns, self._columns, strict=True)), *rows]))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path)


def _format(columns: list[str], rows: Iterable[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    csv.DictWriter(buffer, columns, restval="", lineterminator="\n").writerows(rows)
    return buffer.getvalue()
