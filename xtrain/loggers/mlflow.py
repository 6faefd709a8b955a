"""Metrics to MLflow, by its own package."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from xtrain.errors import ConfigurationError, MissingDependencyError, explain
from xtrain.loggers.base import Logger, rank_zero_only
from xtrain.loggers.values import as_pixels, flat, with_prefix

_LONGEST_PARAMETER, _MOST_PARAMETERS = 6000, 100  # limits of MLflow's log_batch


class MLFlowLogger(Logger):
    """Sends metrics, hyperparameters and images to a run of MLflow.

    Args:
        experiment_name: made if it does not exist.
        run_name: shown for the run.
        tracking_uri: a server or ``sqlite:///runs.db``; default: ``MLFLOW_TRACKING_URI``, else MLflow's own.
        tags: of the run.
        run_id: continue this run.
        prefix: put before the name of every metric.
        artifact_location: where artifacts of a new experiment go.
        save_dir: a folder for runs, without a `tracking_uri`.
        log_model: False only: checkpoints are not uploaded.
        synchronous: True only, or None: each row is sent at once.

    Raises:
        ConfigurationError: if checkpoints should be uploaded, or rows sent later.

    Example:
        >>> trainer = Trainer(logger=MLFlowLogger("gan", tracking_uri="sqlite:///runs.db"))
    """

    def __init__(
        self,
        experiment_name: str = "lightning_logs",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        prefix: str = "",
        artifact_location: str | None = None,
        save_dir: str | os.PathLike[str] | None = None,
        log_model: bool = False,
        synchronous: bool | None = None,
    ) -> None:
        if log_model or synchronous is False:
            fix = "MLFlowLogger(...), and logger.experiment.log_artifact(logger.run_id, path) after trainer.fit"
            received = f"log_model={log_model!r}, synchronous={synchronous!r}"
            raise ConfigurationError(explain("log_model=False and synchronous=True", received, fix))
        self._experiment_name, self._run_name, self._run_id = experiment_name, run_name, run_id
        place = None if save_dir is None else f"file:{os.fspath(save_dir)}"
        self._uri, self._tags = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or place, dict(tags or {})
        self._prefix, self._artifacts = prefix, artifact_location
        self._client: Any = None

    @property
    def experiment(self) -> Any:
        """The `mlflow.tracking.MlflowClient`; the run is `run_id`. Use it on rank 0 only.

        Raises:
            MissingDependencyError: if the mlflow package is not installed.
        """
        if self._client is None:
            try:
                from mlflow.tracking import MlflowClient
            except ImportError as error:
                raise MissingDependencyError(
                    "MLFlowLogger needs the mlflow package: pip install 'xtrain-torch[mlflow]'"
                ) from error
            self._client = MlflowClient(self._uri)
            if self._run_id is None:
                found = self._client.get_experiment_by_name(self._experiment_name)
                place = (
                    self._client.create_experiment(self._experiment_name, self._artifacts)
                    if found is None
                    else found.experiment_id
                )
                run = self._client.create_run(place, tags=self._tags, run_name=self._run_name)
                self._run_id = run.info.run_id
        return self._client

    @property
    def name(self) -> str:
        """The name of the experiment."""
        return self._experiment_name

    @property
    def run_id(self) -> str:
        """The id of the run; the first one to ask makes it."""
        if self._run_id is None and self.enabled:
            _ = self.experiment
        return self._run_id or ""

    @property
    def version(self) -> int | str:
        """The id of the run."""
        return self.run_id

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send one row."""
        from mlflow.entities import Metric

        client, now = self.experiment, int(time.time() * 1000)
        rows = with_prefix(metrics, self._prefix).items()
        batch = [Metric(_allowed(name), value, now, step or 0) for name, value in rows]
        client.log_batch(self.run_id, metrics=batch)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Add parameters to the run; MLflow keeps them as text."""
        from mlflow.entities import Param

        client = self.experiment
        rows = [Param(_allowed(name), str(value)[:_LONGEST_PARAMETER]) for name, value in flat(params).items()]
        for start in range(0, len(rows), _MOST_PARAMETERS):
            client.log_batch(self.run_id, params=rows[start : start + _MOST_PARAMETERS])

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[Any], step: int | None = None) -> None:
        """Add images as files of the run."""
        client = self.experiment
        for index, image in enumerate(images):
            client.log_image(self.run_id, as_pixels(image), f"{_allowed(key)}/step_{step or 0}_{index}.png")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run."""
        if self._client is not None:
            self._client.set_terminated(self.run_id, "FINISHED" if status == "success" else "FAILED")


def _allowed(name: str) -> str:
    """Return `name` with what MLflow refuses in names replaced."""
    return re.sub(r"[^\w\-. /:]", "_", name)
