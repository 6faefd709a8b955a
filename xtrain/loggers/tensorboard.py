"""Metrics as TensorBoard event files; the tensorboard package is imported when the first one is written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtrain.errors import ConfigurationError, MissingDependencyError, explain
from xtrain.loggers.base import FileLogger, rank_zero_only
from xtrain.loggers.values import as_pixels, flat, with_prefix

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger(FileLogger):
    """Writes event files to ``save_dir/name/version_N``; look at them with ``tensorboard --logdir save_dir``.

    Args:
        save_dir: the folder of all experiments.
        name: the experiment.
        version: an int N or the name of a folder; None takes the first N that is free.
        prefix: put before the name of every metric.
        log_graph: False only: `xtrain` runs no step to draw it.
        default_hp_metric: taken as in Lightning, not needed: no metric is made up for hyperparameters.
        sub_dir: a folder below that of the run, for the event files.
        **kwargs: passed on to `torch.utils.tensorboard.SummaryWriter`.

    Raises:
        ConfigurationError: if a graph should be drawn.

    Example:
        >>> trainer = Trainer(logger=TensorBoardLogger("logs"))
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(save_dir, name, version)
        if log_graph:
            fix = "logger.experiment.add_graph(module, example) after trainer.fit"
            raise ConfigurationError(explain("log_graph=False", "log_graph=True", fix))
        self._prefix, self._kwargs, self._below = prefix, kwargs, os.fspath(sub_dir or "")
        self._writer: SummaryWriter | None = None

    @property
    def experiment(self) -> SummaryWriter:
        """The `SummaryWriter`, for images, text and histograms. Use it on rank 0 only.

        Raises:
            MissingDependencyError: if the tensorboard package is not installed.
        """
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingDependencyError(
                    "TensorBoardLogger needs the tensorboard package: pip install 'xtrain-torch[loggers]'"
                ) from error
            self._writer = SummaryWriter(os.path.join(self.log_dir, self._below), **self._kwargs)  # noqa: PTH118  # it may be a URL
        return self._writer

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add one scalar per metric."""
        for name, value in with_prefix(metrics, self._prefix).items():
            self.experiment.add_scalar(name, value, step)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Add the hyperparameters to the HPARAMS page; what it cannot hold is written as text.

        The event file can be read by its owner only from then on: hyperparameters may hold tokens.
        """
        from torch.utils.tensorboard.summary import hparams

        writer = self.experiment
        for path in Path(self.log_dir).glob("events.out.*"):
            path.chmod(0o600)
        for summary in hparams(flat(params), {}):
            writer._get_file_writer().add_summary(summary)

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[Any], step: int | None = None) -> None:
        """Add images; several get a number each."""
        for index, image in enumerate(images):
            name = f"{key}/{index}" if len(images) > 1 else key
            self.experiment.add_image(name, as_pixels(image), step, dataformats="HWC")

    @rank_zero_only
    def save(self) -> None:
        """Write what the writer kept back."""
        if self._writer is not None:
            self._writer.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()  # it opens another file if something is logged after all
