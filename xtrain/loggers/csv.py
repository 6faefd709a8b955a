"""Metrics as a CSV file, with nothing but the standard library."""

from __future__ import annotations

import csv
import io
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xtrain.errors import ConfigurationError, explain
from xtrain.loggers.base import FileLogger, rank_zero_only, write_private
from xtrain.loggers.values import plain, with_prefix


class CSVLogger(FileLogger):
    """Writes ``metrics.csv`` (and ``hparams.json``) to ``save_dir/name/version_N``.

    The file has one row per call and one column per metric, ``step`` first; columns may appear later.
    It is complete on disk after every `flush_logs_every_n_steps` rows, at the end of an epoch and at
    the end of the run: rows are appended, and a new column replaces the file in one move, so that a
    crash loses rows at most. In the folder of an earlier run it goes on where that one ended. A disk that
    is full does not end the training: the rows are kept, and written when there is room again.
    ``hparams.json`` can be read by its owner only.

    Args:
        save_dir: the folder of all experiments.
        name: the experiment.
        version: an int N or the name of a folder; None takes the first N that is free.
        prefix: put before the name of every metric.
        flush_logs_every_n_steps: rows kept in memory before they are written.

    Raises:
        ConfigurationError: for arguments that mean nothing, or a name or version that leaves `save_dir`.

    Example:
        >>> logger = CSVLogger("logs")
        >>> logger.log_metrics({"loss": 0.5}, step=1)
        >>> logger.save()
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(save_dir, name, version)
        rows = flush_logs_every_n_steps
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            received = f"flush_logs_every_n_steps={rows!r}"
            raise ConfigurationError(explain("a number of rows of at least 1", received, "CSVLogger('logs')"))
        self._prefix, self._keep = prefix, rows
        self._rows: list[dict[str, Any]] = []
        self._opened = self._warned = False

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.log_dir) / "metrics.csv"

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row.

        Raises:
            ConfigurationError: if one of `metrics` is called ``step``, as the first column is.
        """
        if "step" in metrics:
            fix = "logger.log_metrics({'loss': 0.5}, step=1)"
            raise ConfigurationError(explain("metrics with other names than 'step'", dict(metrics), fix))
        self._rows.append({"step": step, **with_prefix(metrics, self._prefix)})
        if len(self._rows) % self._keep == 0:  # also after a time in which nothing could be written
            self.save()

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Write ``hparams.json``, for its owner only; what JSON cannot hold is written as text."""
        target = Path(self.log_dir) / "hparams.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_private(target, json.dumps(plain(params), indent=2) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """Return the version, and how many rows there are so far."""
        if not self.enabled:
            return {}
        self.save()
        return {**super().state_dict(), "rows": len(self._read()) if self.path.exists() else 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the folder of the earlier run, and drop the rows that it wrote after its checkpoint."""
        if not self.enabled or not state:
            return
        super().load_state_dict(state)
        if self._version == state["version"] and self.path.exists():
            columns, rows = self._header(), self._read()
            if len(rows) > state["rows"]:
                _replace(self.path, columns, rows[: state["rows"]])

    def _read(self) -> list[dict[str, Any]]:
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    @rank_zero_only
    def save(self) -> None:
        """Bring the file up to date; rows that cannot be written are kept for the next time, with one warning."""
        if not self._rows:
            return
        try:
            self._write()
        except OSError as error:
            if not self._warned:
                received = f"{type(error).__name__}: {error}"
                fix = "free space on that disk; the rows are kept and written later"
                warnings.warn(explain(f"to write {self.path}", received, fix), stacklevel=3)
            self._warned = True
        else:
            self._rows, self._warned = [], False

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run; say how many rows are lost if they still cannot be written."""
        self.save()
        if self._rows:
            lost = f"{len(self._rows)} rows that could not be written and are lost"
            warnings.warn(explain(f"all rows in {self.path}", lost), stacklevel=3)

    def _write(self) -> None:
        columns = self._header()
        new = [name for name in dict.fromkeys(name for row in self._rows for name in row) if name not in columns]
        if new:
            self._widen(columns, new)
        _append(self.path, _format([*columns, *new], self._rows))

    def _header(self) -> list[str]:
        """Return the columns of the file as they are now: another run may write to it, too."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return []
        if not self._opened:
            text = self.path.read_bytes()
            if not text.endswith(b"\n"):  # a crash left the last line torn
                with self.path.open("r+b") as file:
                    file.truncate(text.rfind(b"\n") + 1)
        self._opened = True
        with self.path.open(newline="", encoding="utf-8") as file:
            return next(csv.reader(file), [])

    def _widen(self, columns: list[str], new: list[str]) -> None:
        """Rewrite the file with more columns."""
        rows: list[dict[str, Any]] = []
        if columns:
            rows = self._read()
        _replace(self.path, [*columns, *new], rows)


def _replace(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    """Write the whole file anew, in one move."""
    draft = path.with_suffix(".new")
    try:
        with draft.open("w", newline="", encoding="utf-8") as file:
            file.write(_format(columns, [dict(zip(columns, columns, strict=True)), *rows]))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def _append(path: Path, text: str) -> None:
    """Append all of `text`, or nothing: a block that is written in part would be written again."""
    with path.open("ab", buffering=0) as file:
        end, rest = file.seek(0, os.SEEK_END), text.encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise


def _format(columns: list[str], rows: Iterable[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    csv.DictWriter(buffer, columns, restval="", lineterminator="\n").writerows(rows)
    return buffer.getvalue()
