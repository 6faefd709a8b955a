"""What a logger is, and how loggers that write files number their runs."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path, PurePath
from typing import Any, TypeVar, cast

from torch import Tensor

from xtrain.errors import ConfigurationError, explain

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

    The Trainer calls `prepare` before anything is computed, `log_metrics` at log points, `save` at the end of
    an epoch and `finalize` once.
    Decorate what writes with `rank_zero_only`.

    Attributes:
        enabled: False on every rank but 0; set by the Trainer.

    Example:
        >>> class Printing(Logger):
        ...     name, version = "printing", 0
        ...
        ...     def log_metrics(self, metrics, step=None):
        ...         print(step, metrics)
        >>> Printing().log_metrics({"loss": 0.5}, step=50)
        50 {'loss': 0.5}
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

    def prepare(self) -> None:  # noqa: B027  # nothing to do for a logger that needs no place
        """Claim the place that is written to, so that one which cannot be written to ends the run before it trains."""

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Take `metrics`, floats by name, as they were after training step `step`."""

    def log_hyperparams(self, params: Any) -> None:  # noqa: B027  # a logger may ignore them
        """Take the hyperparameters of the run: a mapping, a Namespace or a dataclass."""

    def log_image(self, key: str, images: Sequence[Any], step: int | None = None) -> None:  # noqa: B027  # most loggers show no images
        """Take images under one name; override it in a logger that can show them.

        Args:
            key: the name.
            images: what `xtrain.loggers.values.as_pixels` takes: tensors, arrays, figures.
            step: the training step.
        """

    def save(self) -> None:  # noqa: B027  # nothing to do for a logger that keeps nothing back
        """Write what was kept back."""

    def state_dict(self) -> dict[str, Any]:
        """Return what tells a run that goes on from a checkpoint where its rows belong: plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  # a logger may begin anew
        """Go on where an earlier run was when it called `state_dict`; called before the first row."""

    def finalize(self, status: str) -> None:
        """End the run. `status`: ``"success"`` or ``"failed"``."""
        self.save()


def show_images(loggers: Sequence[Any], key: str, images: Any, step: int) -> bool:
    """Give images to the loggers that can show them; return whether there is one.

    Args:
        loggers: all of them.
        key: the name of the images.
        images: one, or a list or tuple of them.
        step: the training step.
    """
    several = list(images) if isinstance(images, list | tuple) else [images]
    able = [each for each in loggers if getattr(type(each), "log_image", Logger.log_image) is not Logger.log_image]
    for logger in able:
        logger.log_image(key, several, step)
    return bool(able)


class FileLogger(Logger):
    """A logger that owns the folder ``save_dir/name/version_N`` of its run.

    Args:
        save_dir: the folder of all experiments.
        name: the experiment; None or "" puts the versions into `save_dir` itself.
        version: an int N or the name of a folder; None takes the first N that is free.

    Raises:
        ConfigurationError: for arguments of other types, or a name or version that leaves `save_dir`.
    """

    def __init__(
        self, save_dir: str | os.PathLike[str], name: str | None = "lightning_logs", version: int | str | None = None
    ) -> None:
        if not isinstance(save_dir, str | os.PathLike) or not os.fspath(save_dir):
            raise self._wrong("a folder as save_dir", f"{save_dir!r} ({type(save_dir).__name__})")
        if "://" in os.fspath(save_dir):
            raise self._wrong("a folder of this machine as save_dir", repr(save_dir))
        if not (name is None or _inside(name)):
            raise self._wrong("the name of an experiment, a folder in save_dir", f"name={name!r}")
        if not (version is None or _is_number(version) or (version and _inside(version))):
            raise self._wrong("a version that is an int of at least 0 or a folder's name", f"version={version!r}")
        self._save_dir, self._name, self._version = Path(save_dir), name or "", version

    def _wrong(self, expected: str, received: str) -> ConfigurationError:
        return ConfigurationError(explain(expected, received, f"{type(self).__name__}('logs', name='gan', version=0)"))

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

    def state_dict(self) -> dict[str, Any]:
        """Return the version."""
        return {"version": self.version} if self.enabled else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the folder of the earlier run, if it is there and no version was asked for.

        Raises:
            ConfigurationError: for a version that leaves `save_dir`.
        """
        if self._version is None and state:
            if not (_is_number(state["version"]) or _inside(state["version"])):  # a checkpoint may be a stranger's
                raise self._wrong("a version of a checkpoint that stays in save_dir", f"{state['version']!r}")
            self._version = state["version"]
            if not Path(self.log_dir).is_dir():
                self._version = None

    def adopt_version(self, version: int | str) -> None:
        """Take the version that rank 0 has claimed, on a rank that claims none."""
        self._version = version

    @rank_zero_only
    def prepare(self) -> None:
        """Make the folder of this run.

        Raises:
            ConfigurationError: if it cannot be made or written to.
        """
        try:
            folder = Path(self.log_dir)
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(f"{folder} cannot be written to")
        except OSError as error:
            received = f"{type(error).__name__}: {error}"
            raise self._wrong(f"a folder that {type(self).__name__} can write to", received) from error


def _is_number(version: Any) -> bool:
    return isinstance(version, int) and not isinstance(version, bool) and version >= 0


def _inside(part: Any) -> bool:
    """Whether `part` is text that, as a path, stays in the folder it is put into."""
    return isinstance(part, str) and not PurePath(part).is_absolute() and ".." not in PurePath(part).parts


def _claim(folder: Path) -> bool:
    """Make `folder`; return False if another run made it before."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def write_private(path: Path, text: str) -> None:
    """Write `text` to `path`, readable by its owner only: hyperparameters may hold tokens and passwords."""
    path.touch(0o600)
    path.chmod(0o600)  # it may have been there
    path.write_text(text, encoding="utf-8")


def as_text(value: Any) -> str:
    """Return a short name for an object; the contents of tensors and data sets are no hyperparameters."""
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}, {value.dtype}"
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    text = str(value)
    if " object at 0x" in text:  # nothing but its address
        return f"{type(value).__module__}.{type(value).__qualname__}"
    return text if len(text) <= 200 else f"{text[:200]}..."
