"""What a run consists of, who owns it, and what users, modules and callbacks read of it from a Trainer.

`Run` is made by `xtrain.run.setup.running`, which alone fills it; the loops read it. `Progress` belongs to the
Trainer and goes on from one fit to the next; the loop of training alone writes it. A Trainer keeps settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

from xtrain.callbacks.base import Callback
from xtrain.callbacks.progress import ProgressBar
from xtrain.collectives import Collectives
from xtrain.compat.attributes import LightningAttributes
from xtrain.configure import LRSchedulerConfig
from xtrain.contract import Backend
from xtrain.data.datamodule import LightningDataModule
from xtrain.data.loaders import read_loaders
from xtrain.errors import ConfigurationError, explain
from xtrain.launch.join import own_rank
from xtrain.life import GradientLife
from xtrain.loggers.base import Logger, show_images
from xtrain.metrics.log import MetricLog
from xtrain.module import LightningModule
from xtrain.precision import Precision
from xtrain.run.epochs import FitPlan as FitPlan
from xtrain.run.options import Options
from xtrain.run.progress import Progress as Progress
from xtrain.stages import TrainerFn

T = TypeVar("T")


@dataclass(eq=False)
class Run:
    """One run, from set-up to clean-up.

    Attributes:
        trainer: whose run it is; gives the settings and the progress.
        called: what was called.
        stage: what runs now: fit, validate, test, predict or sanity; inside a fit it is validate for a while.
        module: the user's module.
        datamodule: the user's DataModule, if any.
        hooks: the overridden hooks by name, callbacks first.
        life: what the optimizers share.
        metrics: what is logged.
        transfer: brings ``(batch, dataloader_idx)`` to the device.
        schedulers: of the learning rates.
        plan: loaders and ends of a fit.
        loaders: of evaluation, by stage.
        window: micro-batches that automatic optimization has accumulated since the last step.
        resumption: how it goes on from a checkpoint, None for a new one.
        points: what happens where its state is whole, None if nothing does.
        active: whether it has not ended yet.
        failed: whether it ended by an exception.
        evaluated: the current batch of an evaluation, from 0; None between them.
        keeps_predictions: whether anybody wants the outputs of ``predict_step`` at the end.
        predictions: these outputs.
        indices: of each loader of a prediction the indices of its batches, where a callback needs them.
        remark: what has just changed the course of the training, for messages.
        compiled_step: what became of ``compile="step"``, see `xtrain.compiled.step.CompiledStep`; None without it.
        watch: looks whether a fit trains anything, see `xtrain.run.checks.IdleWatch`.
    """

    trainer: TrainerState
    called: TrainerFn
    stage: str
    module: LightningModule
    datamodule: LightningDataModule | None
    hooks: dict[str, list[Callable[..., Any]]]
    life: GradientLife
    metrics: MetricLog
    transfer: Callable[[Any, int], Any]
    schedulers: list[LRSchedulerConfig] = field(default_factory=list)
    plan: FitPlan = field(default_factory=FitPlan)
    loaders: dict[str, list[Any]] = field(default_factory=dict)
    window: int = 0
    resumption: Any = None
    points: Any = None
    active: bool = True
    failed: bool = False
    evaluated: int | None = None
    keeps_predictions: bool = True
    predictions: Any = None
    indices: list[Any] = field(default_factory=list)
    remark: str = ""
    watch: Callable[[], None] = lambda: None
    compiled_step: Any = None

    def read_loaders(self, stage: str, given: Any) -> list[Any]:
        """Return the loaders of `stage` for this rank; see `xtrain.data.loaders.read_loaders`."""
        options = self.trainer.options
        ranks = self.backend.collectives if options.use_distributed_sampler else Collectives()
        shuffles = not (options.overfit_batches and stage in ("fit", "validate"))
        return read_loaders(stage, given, (self.datamodule, self.module), ranks, shuffles)

    @property
    def log_step(self) -> int:
        """The x-axis of the loggers between training steps: in a fit the number of the last one, from 0."""
        steps = self.trainer.progress.logged_steps
        return max(steps - 1, 0) if self.called == "fit" else steps

    @property
    def backend(self) -> Backend:
        """The backend of the Trainer."""
        return self.trainer.backend

    @property
    def at_end_of_epoch(self) -> bool:
        """Whether the current training batch is the last of a whole epoch."""
        progress, batches = self.trainer.progress, self.plan.batches
        return progress.is_last_batch if batches is None else progress.batch_idx + 1 == batches

    @property
    def accumulating(self) -> bool:
        """Whether automatic optimization keeps the gradients of the current batch for a later step."""
        every = self.trainer.accumulate_grad_batches
        return bool((self.trainer.progress.batch_idx + 1) % every) and not self.trainer.progress.is_last_batch

    def position(self) -> str:
        """Say where the run is: what the ranks of a run tell each other with every call."""
        if self.stage != "fit":
            return f"in {self.stage}" + ("" if self.evaluated is None else f", batch {self.evaluated}")
        progress = self.trainer.progress
        return f"in training step {progress.batch_idx} of epoch {progress.epoch}{self.remark}"

    def begin(self) -> None:
        """Put the state of a checkpoint back that belongs before the hooks of an epoch."""
        if self.resumption is not None and not self.trainer.progress.done:
            self.resumption.begin_epoch()

    def epoch(self) -> Iterator[tuple[Any, bool]]:
        """Yield ``(batch, is_last)`` for what is left of the current epoch, which is all but where a run goes on."""
        progress = self.trainer.progress
        if not progress.done:
            return self.plan.epoch(progress.epoch)
        self.resumption.begin_epoch()
        return self.plan.epoch(progress.epoch, self.resumption, progress.done)

    def call(self, name: str, *arguments: Any) -> list[Any]:
        """Call the overridden hooks `name`: callbacks first, then the module."""
        hooks = self.hooks.get(name)
        if not hooks:
            return []
        self.metrics.hook(name)
        return [hook(*arguments) for hook in hooks]


class TrainerState(LightningAttributes):
    """The settings of a `Trainer`, which sets every attribute declared here, and views on its current or last run."""

    # What it was given.
    backend: Backend
    precision: Precision
    origin: str  # backend, precision and processes, and where they come from: the line at the start of a run
    callbacks: list[Callback]
    loggers: list[Logger]
    default_root_dir: str
    fast_dev_run: bool | int
    max_epochs: int | None
    max_steps: int
    step_counting: str
    limit_train_batches: int | float | None
    limit_val_batches: int | float | None
    limit_test_batches: int | float | None
    limit_predict_batches: int | float | None
    num_sanity_val_steps: int
    check_val_every_n_epoch: int | None
    val_check_interval: int | float | timedelta | None
    uneven_batches: str
    accumulate_grad_batches: int
    gradient_clip_val: float | None
    gradient_clip_algorithm: str | None
    log_every_n_steps: int
    nonfinite_loss: str
    check_replicas: str
    inference_mode: bool
    options: Options

    # What it comes to.
    progress: Progress
    run: Run | None = None  # the current one, or the last
    last_fit: Run | None = None  # the current fit, or the last: its optimizers stay readable
    should_stop: bool = False  # anybody may set it; the loop looks at it after every batch

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle goes on from the same progress, without the run.
        return {**self.__dict__, "run": None, "last_fit": None}

    # ---------------------------------------------------------------- where the training is

    current_epoch = property(lambda self: self.progress.epoch, doc="Epochs that were finished.")
    global_step = property(lambda self: self.progress.global_step, doc="Training steps in which an optimizer stepped.")
    batch_idx = property(lambda self: self.progress.batch_idx, doc="The current training batch of the epoch, from 0.")
    is_last_batch = property(lambda self: self.progress.is_last_batch, doc="Whether the epoch ends with this batch.")

    @property
    def stage(self) -> str | None:
        """What runs: fit, validate, test, predict or sanity; None between runs."""
        return self.run.stage if self.run is not None and self.run.active else None

    training = property(lambda self: self.stage == "fit", doc="Whether `fit` runs.")
    validating = property(lambda self: self.stage == "validate", doc="Whether `validate` runs.")
    testing = property(lambda self: self.stage == "test", doc="Whether `test` runs.")
    predicting = property(lambda self: self.stage == "predict", doc="Whether `predict` runs.")
    sanity_checking = property(lambda self: self.stage == "sanity", doc="Whether the check before training runs.")

    # ---------------------------------------------------------------- what the run consists of

    @property
    def lightning_module(self) -> LightningModule:
        """The module of the current or last run."""
        return self._of_run().module

    @property
    def optimizers(self) -> list[Any]:
        """The raw optimizers of the current or last fit."""
        return [] if self.last_fit is None else [wrapped.optimizer for wrapped in self.last_fit.life.optimizers]

    @property
    def lr_scheduler_configs(self) -> list[LRSchedulerConfig]:
        """The schedulers of the current or last fit, with their settings."""
        return [] if self.last_fit is None else self.last_fit.schedulers

    datamodule = property(lambda self: self.run and self.run.datamodule, doc="The DataModule of the run, or None.")
    logger = property(lambda self: self.loggers[0] if self.loggers else None, doc="The first logger.")

    @property
    def life(self) -> GradientLife:
        """What the optimizers of the current or last run share."""
        return self._of_run().life

    @property
    def metrics(self) -> MetricLog:
        """What the current or last run logged."""
        return self._of_run().metrics

    @property
    def compiled_step(self) -> Any:
        """What became of ``compile="step"``: paths, replays, seconds, ratio, reasons; None without it."""
        return None if self.run is None else self.run.compiled_step

    @property
    def callback_metrics(self) -> Any:
        """The latest metrics by name, of the current or last run."""
        return {} if self.run is None else self.run.metrics.callback_metrics

    @property
    def logged_metrics(self) -> Any:
        """The latest metrics that were sent to the loggers."""
        return {} if self.run is None else self.run.metrics.logged_metrics

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """The latest metrics of the progress bar."""
        return {} if self.run is None else self.run.metrics.progress_bar_metrics

    def _of_run(self) -> Run:
        if self.run is None:
            raise ConfigurationError(explain("a Trainer that has run a module", "a new one", "trainer.fit(model)"))
        return self.run

    # ---------------------------------------------------------------- how long it goes on

    @property
    def num_training_batches(self) -> int | float:
        """Training batches per epoch; infinity if the loader does not know."""
        batches = None if self.run is None else self.run.plan.batches
        return math.inf if batches is None else batches

    @property
    def total_batches(self) -> int | float:
        """Training batches of the current or last fit and those before it; infinity if that is not known."""
        plan, progress, left = self._of_run().plan, self.progress, math.inf
        if plan.max_epochs is not None and plan.batches is not None:
            left = (plan.max_epochs - progress.epoch) * plan.batches - progress.done
        if self.max_steps >= 0 and self.step_counting == "training":
            left = min(left, (self.max_steps - self.global_step) * self.accumulate_grad_batches)
        return progress.batches + max(min(left, plan.steps_left), 0)

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps automatic optimization will take, or those given to `fit`; infinity if that is not known."""
        plan = self._of_run().plan
        limit = min(plan.steps_left + self.progress.global_step, math.inf if self.max_steps < 0 else self.max_steps)
        if plan.max_epochs is None or plan.batches is None:
            return limit
        return min(-(-plan.batches // self.accumulate_grad_batches) * plan.max_epochs, limit)

    # ---------------------------------------------------------------- the ranks

    world_size = property(lambda self: self.backend.collectives.world_size, doc="Number of processes.")
    local_rank = property(lambda self: self.backend.collectives.local_rank, doc="This process on its host.")
    is_global_zero = property(lambda self: self.global_rank == 0, doc="Whether this is rank 0.")

    @property
    def global_rank(self) -> int:
        """This process, from 0; before a run, what the launcher said."""
        return own_rank() if self.run is None else self.backend.collectives.rank

    def barrier(self) -> None:
        """Wait for all ranks of the run; every one must come here.

        Example:
            >>> trainer.barrier()
        """
        self.backend.collectives.barrier()

    def broadcast(self, value: T, source: int = 0) -> T:
        """Return `value` (a tensor, or anything picklable) of rank `source` on every rank.

        Example:
            >>> trainer.broadcast({"path": "runs/7"})
            {'path': 'runs/7'}
        """
        return self.backend.collectives.broadcast(value, source)

    def log_image(self, key: str, images: Any) -> None:
        """Show images in the loggers; see `LightningModule.log_image`.

        Example:
            >>> trainer.loggers[:] = [xtrain.loggers.TensorBoardLogger("logs")]
            >>> trainer.log_image("sample", torch.rand(3, 8, 8))
            >>> trainer.loggers[0].finalize("success")
        """
        if (
            self.is_global_zero
            and not self.sanity_checking
            and not show_images(self.loggers, key, images, self.progress.logged_steps)
        ):
            fix = "Trainer(logger=TensorBoardLogger('logs'))"
            self.life.warn_once(explain("a logger that shows images", f"log_image({key!r}, ...) without one", fix))

    def print(self, *values: Any) -> None:
        """Print on rank 0, above the progress bar if there is one.

        Example:
            >>> trainer.print("step", trainer.global_step)
            step 4
        """
        if self.is_global_zero:
            bars = [c.print for c in self.callbacks if isinstance(c, ProgressBar)]
            (bars[0] if bars else print)(" ".join(map(str, values)))
