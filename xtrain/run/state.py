"""What users, modules and callbacks read from a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from xtrain.callbacks.base import Callback
from xtrain.callbacks.progress import ProgressBar
from xtrain.collectives import Collectives
from xtrain.configure import LRSchedulerConfig
from xtrain.contract import Backend
from xtrain.data.loaders import LightningDataModule
from xtrain.errors import ConfigurationError, explain
from xtrain.launch.join import own_rank
from xtrain.loggers.base import Logger
from xtrain.metrics.log import MetricLog
from xtrain.module import LightningModule
from xtrain.optimizer import GradientLife
from xtrain.run.plan import FitPlan

T = TypeVar("T")


class TrainerState:
    """The read-only side of a `Trainer`, which sets every attribute declared here."""

    # Where the training is.
    current_epoch: int = 0
    global_step: int = 0  # training steps in which at least one optimizer stepped
    batch_idx: int = 0
    is_last_batch: bool = False
    _batches_seen: int = 0
    should_stop: bool = False
    stage: str | None = None  # fit, validate, test, predict or sanity; None between runs

    # What it consists of.
    backend: Backend
    callbacks: list[Callback]
    datamodule: LightningDataModule | None = None
    hooks: dict[str, list[Callable[..., Any]]]
    life: GradientLife
    loggers: list[Logger]
    lr_scheduler_configs: list[LRSchedulerConfig]
    metrics: MetricLog
    module: LightningModule | None = None

    # How long it goes on.
    max_epochs: int | None
    max_steps: int
    accumulate_grad_batches: int
    plan: FitPlan

    @property
    def lightning_module(self) -> LightningModule:
        """The module of the current or last run."""
        if self.module is None:
            raise ConfigurationError(explain("a Trainer that has run a module", "a new one", "trainer.fit(model)"))
        return self.module

    optimizers = property(lambda self: self.life.optimizers, doc="The wrapped optimizers of the run.")
    callback_metrics = property(lambda self: self.metrics.callback_metrics, doc="Latest metrics by name.")
    logged_metrics = property(lambda self: self.metrics.logged_metrics, doc="Metrics sent to loggers.")
    progress_bar_metrics = property(lambda self: self.metrics.progress_bar_metrics, doc="Metrics on the bar.")
    logger = property(lambda self: self.loggers[0] if self.loggers else None, doc="The first logger.")
    world_size = property(lambda self: self.backend.collectives.world_size, doc="Number of processes.")
    global_rank = property(lambda self: _rank(self.backend.collectives), doc="This process, from 0.")
    local_rank = property(lambda self: self.backend.collectives.local_rank, doc="This process on its host.")
    is_global_zero = property(lambda self: self.global_rank == 0, doc="Whether this is rank 0.")
    training = property(lambda self: self.stage == "fit", doc="Whether `fit` runs.")
    validating = property(lambda self: self.stage == "validate", doc="Whether `validate` runs.")
    testing = property(lambda self: self.stage == "test", doc="Whether `test` runs.")
    predicting = property(lambda self: self.stage == "predict", doc="Whether `predict` runs.")

    sanity_checking = property(lambda self: self.stage == "sanity", doc="Whether the check before training runs.")

    @property
    def num_training_batches(self) -> int | float:
        """Training batches per epoch; infinity if the loader does not know."""
        return float("inf") if self.plan.batches is None else self.plan.batches

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps automatic optimization will take; infinity if that is not known."""
        batches, epochs = self.plan.batches, self.plan.max_epochs
        if epochs is None or batches is None:
            return self.max_steps if self.max_steps >= 0 else float("inf")
        total = -(-batches // self.accumulate_grad_batches) * epochs
        return total if self.max_steps < 0 else min(total, self.max_steps)

    def barrier(self) -> None:
        """Wait for all ranks of the run; every one must come here."""
        self.backend.collectives.barrier()

    def broadcast(self, value: T, source: int = 0) -> T:
        """Return `value` (a tensor, or anything picklable) of rank `source` on every rank."""
        return self.backend.collectives.broadcast(value, source)

    def print(self, *values: Any) -> None:
        """Print on rank 0, above the progress bar if there is one."""
        if self.is_global_zero:
            bars = [c.print for c in self.callbacks if isinstance(c, ProgressBar)]
            (bars[0] if bars else print)(" ".join(map(str, values)))


def _rank(ranks: Collectives) -> int:
    return ranks.rank if ranks.world_size > 1 else own_rank()  # before a run, the launcher may have told it
