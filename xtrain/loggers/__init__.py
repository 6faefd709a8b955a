"""Loggers: where metrics go. `CSVLogger` needs nothing, the others the package they are named after."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from xtrain.errors import ConfigurationError, explain
from xtrain.loggers.aim import AimLogger as AimLogger
from xtrain.loggers.base import Logger as Logger
from xtrain.loggers.csv import CSVLogger as CSVLogger
from xtrain.loggers.mlflow import MLFlowLogger as MLFlowLogger
from xtrain.loggers.tensorboard import TensorBoardLogger as TensorBoardLogger
from xtrain.loggers.wandb import WandbLogger as WandbLogger

__all__ = ["AimLogger", "CSVLogger", "Logger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger", "as_loggers"]


def as_loggers(logger: Any, root: str) -> list[Logger]:
    """Return the loggers that ``Trainer(logger=...)`` asks for.

    Args:
        logger: None or False for none, True for a `CSVLogger`, one logger or several.
        root: folder of the `CSVLogger`.

    Raises:
        ConfigurationError: for anything that is no `Logger`.

    Example:
        >>> [type(logger).__name__ for logger in as_loggers(True, "logs")]
        ['CSVLogger']
    """
    if logger is None or logger is False:
        return []
    if logger is True:
        return [CSVLogger(root)]
    loggers = list(logger) if isinstance(logger, Iterable) else [logger]
    for each in loggers:
        if not (isinstance(each, Logger) or _serves_as_one(each)):
            raise ConfigurationError(
                explain(
                    "logger=True, a Logger, or a list of them",
                    f"{each!r} ({type(each).__name__})",
                    "Trainer(logger=CSVLogger('logs'))",
                )
            )
    return loggers


def _serves_as_one(logger: Any) -> bool:
    """Return whether `logger` has the methods of one, as those of Lightning do."""
    return all(callable(getattr(logger, name, None)) for name in ("log_metrics", "log_hyperparams", "save", "finalize"))
