"""What a logger is, and how loggers that write files number their runs."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

Method = TypeVar("Method", bound=Callable[..., None])


def rank_zero_only(method: Method) -> Method:
    """Return `method` of a logger, doing nothing where ``enabled`` is False."""

    @wraps(method)
    def wrapper(self: Logger, *args: Any, **kwargs: Any) -> None:
        if self.enabled:
            method(self, *args, **kwargs)

    return cast("Method", wrapper)


class Logger(ABC):
    """Receives metrics as plain floats at log points. Derive from it to send them elsewhere.

    The Trainer calls `log_metrics` at log points, `save` at the end of an epoch and `finalize` once.
    Decorate what writes with `rank_zero_only`.

    Attributes:
        enabled: False on every rank but 0; set by the Trainer.
    """

    enabled: bool = True

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the experiment."""

    @property
    @abstractmethod
    def version(self) -> int | str:
        """What tells this run from others of the same name."""

    @property
    def log_dir(self) -> str | None:
        """The folder of this run, None if there is none."""
        return None

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Take `metrics`, floats by name, as they were after training step `step`."""

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:  # noqa: B027  # a logger may ignore them
        """Take the hyperparameters of the run."""

    def save(self) -> None:  # noqa: B027  # nothing to do for a logger that keeps nothing back
        """Write what was kept back."""

    def finalize(self, status: str) -> None:
        """End the run. `status`: ``"success"`` or ``"failed"``."""
        self.save()


class FileLogger(Logger):
    """A logger that owns the folder ``save_dir/name/version_N`` of its run.

    Args:
        save_dir: the folder of all experiments.
        name: the experiment.
        version: an int N or the name of a folder; None takes the first N that is free.
    """

    def __init__(
        self, save_dir: str | os.PathLike[str], name: str = "lightning_logs", version: int | str | None = None
    ) -> None:
        self._save_dir, self._name, self._version = Path(save_dir), name, version

    @property
    def name(self) -> str:
        """The name of the experiment."""
        return self._name

    @property
    def version(self) -> int | str:
        """The version; the first one to ask claims a new folder, so that two runs never share one."""
        if self._version is None:
            root = self._save_dir / self._name
            found = [re.fullmatch(r"version_(\d+)", path.name) for path in root.glob("version_*")]
            self._version = 1 + max((int(match[1]) for match in found if match), default=-1)
            while self.enabled and not _claim(root / f"version_{self._version}"):
                self._version += 1
        return self._version

    @property
    def log_dir(self) -> str:
        """The folder of this run."""
        version = self.version
        return str(self._save_dir / self._name / (f"version_{version}" if isinstance(version, int) else version))


def _claim(folder: Path) -> bool:
    """Make `folder`; return False if another run made it before."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True
