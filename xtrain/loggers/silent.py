"""The logger of a fast run: it takes everything and keeps nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xtrain.loggers.base import Logger


class _Anything:
    """Answers every call and every attribute with itself."""

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):  # what Python asks of an object is answered as of any other
            raise AttributeError(name)
        return self

    def __call__(self, *arguments: Any, **options: Any) -> _Anything:
        return self

    def __getitem__(self, key: Any) -> _Anything:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        """Keep nothing."""


class SilentLogger(Logger):
    """Stands for the loggers of ``Trainer(fast_dev_run=True, logger=...)``.

    Calls to its ``experiment`` do nothing, as do calls to methods that only some loggers have.
    """

    name = property(lambda self: "", doc="No name.")
    version = property(lambda self: "", doc="No version.")
    experiment = property(lambda self: _Anything(), doc="Takes every call, such as ``add_image``.")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_Anything(), name)
