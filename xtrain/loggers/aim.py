"""Metrics to Aim, by its own package."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from xtrain.errors import MissingDependencyError
from xtrain.loggers.base import Logger, rank_zero_only
from xtrain.loggers.values import as_pixels, plain, with_prefix


class AimLogger(Logger):
    """Sends metrics, hyperparameters and images to a run of Aim; look at them with ``aim up``.

    Args:
        repo: the folder (or server) of Aim's repository; default: where ``.aim`` is found.
        experiment: the experiment.
        run_name: shown for the run.
        run_hash: continue this run.
        prefix: put before the name of every metric.
        **kwargs: passed on to `aim.Run`.

    Example:
        >>> trainer = Trainer(logger=AimLogger(repo="runs", experiment="gan"))
    """

    def __init__(
        self,
        repo: str | os.PathLike[str] | None = None,
        experiment: str = "lightning_logs",
        run_name: str | None = None,
        run_hash: str | None = None,
        prefix: str = "",
        **kwargs: Any,
    ) -> None:
        self._experiment, self._run_name, self._hash, self._prefix = experiment, run_name, run_hash, prefix
        self._kwargs: dict[str, Any] = {"system_tracking_interval": None, "log_system_params": False, **kwargs}
        self._repo = None if repo is None else os.fspath(repo)
        self._run: Any = None

    @property
    def experiment(self) -> Any:
        """The `aim.Run`. Use it on rank 0 only.

        Raises:
            MissingDependencyError: if the aim package is not installed.
        """
        if self._run is None:
            try:
                from aim import Run
            except ImportError as error:
                raise MissingDependencyError(
                    "AimLogger needs the aim package: pip install 'xtrain-torch[aim]'"
                ) from error
            self._run = Run(run_hash=self._hash, repo=self._repo, experiment=self._experiment, **self._kwargs)
            if self._run_name is not None:
                self._run.name = self._run_name
            self._hash = self._run.hash
        return self._run

    @property
    def name(self) -> str:
        """The name of the experiment."""
        return self._experiment

    @property
    def version(self) -> int | str:
        """The hash of the run."""
        if self._hash is None and self.enabled:
            _ = self.experiment
        return self._hash or ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Track each metric; the epoch goes along with it."""
        epoch = metrics.get("epoch")
        for name, value in with_prefix({k: v for k, v in metrics.items() if k != "epoch"}, self._prefix).items():
            self.experiment.track(value, name=name, step=step, epoch=None if epoch is None else int(epoch))

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Set the hyperparameters of the run."""
        self.experiment.set("hparams", plain(params), strict=False)

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[Any], step: int | None = None) -> None:
        """Track images under one name."""
        from aim import Image
        from PIL.Image import fromarray

        pixels = [as_pixels(image) for image in images]
        shown = [Image(fromarray(p[:, :, 0] if p.shape[2] == 1 else p)) for p in pixels]
        self.experiment.track(shown, name=key, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the run; it is opened again if something is logged after all."""
        if self._run is not None:
            self._run.close()
            self._run = None
