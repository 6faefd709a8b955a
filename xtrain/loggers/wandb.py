"""Metrics to Weights & Biases, by its own package."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from xtrain.errors import ConfigurationError, MissingDependencyError, explain
from xtrain.loggers.base import Logger, rank_zero_only
from xtrain.loggers.values import as_pixels, plain, with_prefix


class WandbLogger(Logger):
    """Sends metrics, hyperparameters and images to a run of Weights & Biases.

    Args:
        name: shown for the run.
        save_dir: where the package keeps its files.
        version: the id of the run, to continue it.
        offline: keep the run on disk, for ``wandb sync``.
        project: the project; default: ``WANDB_PROJECT`` from the environment, else ``lightning_logs``.
        log_model: False only: checkpoints are not uploaded.
        experiment: a run that `wandb.init` returned.
        prefix: put before the name of every metric.
        checkpoint_name: of an upload, which is not made; so is `add_file_policy`.
        add_file_policy: as `checkpoint_name`.
        **kwargs: passed on to `wandb.init`.

    Raises:
        ConfigurationError: if checkpoints should be uploaded.

    Example:
        >>> trainer = Trainer(logger=WandbLogger(project="gan"))
    """

    def __init__(
        self,
        name: str | None = None,
        save_dir: str | os.PathLike[str] = ".",
        version: str | None = None,
        offline: bool = False,
        project: str | None = None,
        log_model: bool = False,
        experiment: Any = None,
        prefix: str = "",
        checkpoint_name: str | None = None,
        add_file_policy: str = "mutable",
        **kwargs: Any,
    ) -> None:
        if log_model:
            fix = "WandbLogger(log_model=False), and logger.experiment.log_artifact(path) after trainer.fit"
            raise ConfigurationError(explain("log_model=False", f"log_model={log_model!r}", fix))
        self._name, self._version, self._prefix, self._run = name, version, prefix, experiment
        self._init: dict[str, Any] = {
            "name": name,
            "dir": os.fspath(save_dir),
            "project": project or os.environ.get("WANDB_PROJECT", "lightning_logs"),
            "mode": "offline" if offline else None,
            "resume": "allow",
            **kwargs,
        }

    @property
    def experiment(self) -> Any:
        """The run of the wandb package. Use it on rank 0 only.

        Raises:
            MissingDependencyError: if the wandb package is not installed.
        """
        if self._run is None:
            try:
                import wandb
            except ImportError as error:
                raise MissingDependencyError(
                    "WandbLogger needs the wandb package: pip install 'xtrain-torch[wandb]'"
                ) from error
            self._run = wandb.run or wandb.init(**{"id": self._version, **self._init})
            # Rows of the Trainer have its steps as x-axis; what the user logs by hand keeps its own.
            self._run.define_metric("trainer/global_step")
            self._run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return self._run

    @property
    def name(self) -> str:
        """The project."""
        return str(self._init["project"])

    @property
    def version(self) -> int | str:
        """The id of the run."""
        if self._version is None and self.enabled:
            self._version = str(self.experiment.id)
        return self._version or ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send one row."""
        x = {} if step is None else {"trainer/global_step": step}
        self.experiment.log({**with_prefix(metrics, self._prefix), **x})

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Add to the configuration of the run."""
        self.experiment.config.update(plain(params), allow_val_change=True)

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[Any], step: int | None = None) -> None:
        """Send images under one name."""
        import wandb

        x = {} if step is None else {"trainer/global_step": step}
        self.experiment.log({key: [wandb.Image(as_pixels(image)) for image in images], **x})

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End a run that failed. One that succeeded stays open, since `test` may follow `fit`."""
        if status == "failed" and self._run is not None:
            self._version = str(self._run.id)
            self._run.finish(exit_code=1)
            self._run = None
