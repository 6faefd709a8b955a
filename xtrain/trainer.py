"""`Trainer`, and the loop: read `Trainer.fit`, `_train` and `_train_epoch` from top to bottom."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from xtrain.callbacks.base import Callback
from xtrain.callbacks.progress import ProgressBar
from xtrain.checks import check_choice, check_clip_value, check_count, check_interval, check_limit
from xtrain.compat.arguments import check_arguments, read_devices
from xtrain.compat.backends import read_backend
from xtrain.compat.environment import environment_defaults
from xtrain.compat.strategies import Accelerator, Strategy
from xtrain.contract import Backend
from xtrain.data.batches import empty_loader
from xtrain.data.datamodule import LightningDataModule
from xtrain.errors import ConfigurationError, explain
from xtrain.launch.auto import resolve
from xtrain.loggers import Logger, as_loggers
from xtrain.loggers.silent import SilentLogger
from xtrain.module import LightningModule
from xtrain.registry import make_backend
from xtrain.run.automatic import AutomaticStep
from xtrain.run.evaluation import accept_arguments, evaluate
from xtrain.run.options import OptionArguments, Options, read_options
from xtrain.run.plan import plan_fit, reload_if_due
from xtrain.run.setup import started_run
from xtrain.run.state import Progress, Run, TrainerState


class Trainer(TrainerState):
    """Runs a `LightningModule` on one backend.

    Args:
        backend: a registered name (``xtrain backends`` lists them), a `Backend` instance, or ``"auto"``: what
            the launcher asks for, else a GPU if there is one, else the CPU.
        backend_options: keyword arguments of the backend, if it is given by name.
        precision: ``"32-true"``, ``"16-mixed"``, ``"bf16-mixed"``, ``"bf16-true"`` or ``"16-true"``; None
            takes what ``accelerate launch`` says, else ``"32-true"``.
        scaler_kwargs: options of the loss scaler of ``16-mixed``, named as `torch.amp.GradScaler`'s.
        devices: number of devices; None or "auto" takes what the launcher started, or one.
        accelerator: Lightning's spelling of the backend, understood for modules that move over.
        strategy: Lightning's spelling of how it is distributed.
        max_epochs: epochs to train; -1 is unlimited. Default: 1000, or unlimited if `max_steps` is given.
        max_steps: stop after so many training steps in which an optimizer stepped; -1 is unlimited.
        limit_train_batches: batches per epoch, as a number or a fraction; so do the other limits.
        limit_val_batches: of validation, as for training.
        limit_test_batches: of testing.
        limit_predict_batches: of prediction.
        fast_dev_run: run so many batches (True: 1) of everything; loggers swallow what they get.
        num_sanity_val_steps: validation batches before training; -1 is all of them.
        check_val_every_n_epoch: epochs between validations; None counts `val_check_interval` across epochs.
        val_check_interval: training batches (or fraction of an epoch) between validations.
        uneven_batches: when ranks have unequally many batches, an epoch ends for all with the first that
            has none (``"drop"``) or the last (``"finish"``; the others repeat their last batch).
        accumulate_grad_batches: batches per step of automatic optimization.
        gradient_clip_val: clips in automatic optimization.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``.
        log_every_n_steps: training steps between two reads of logged values.
        nonfinite_loss: ``"warn"`` once, ``"stop"`` or ``"ignore"`` when a loss is NaN or infinite. On
            asynchronous devices the latest loss is looked at every `log_every_n_steps`.
        callbacks: one or several.
        logger: True for a `CSVLogger`, one or several loggers, or None.
        enable_progress_bar: show a progress bar on rank 0.
        default_root_dir: where loggers write; default: the working directory.
        inference_mode: evaluate under `torch.inference_mode` instead of `torch.no_grad`.
        **others: see `xtrain.run.options.Options`.
        **others: the other arguments of Lightning's Trainer, with values that change nothing here.

    Raises:
        ConfigurationError: for an argument that means nothing.

    Example:
        >>> trainer = Trainer(backend="cpu", precision="bf16-mixed", max_epochs=1, enable_progress_bar=False)
        >>> trainer.fit(module, data)
        >>> trainer.global_step, trainer.lightning_module.optimizers().step_count
        (4, 4)
    """

    @environment_defaults(*OptionArguments.__annotations__)
    def __init__(
        self,
        backend: str | Backend | None = None,
        *,
        backend_options: Mapping[str, Any] | None = None,
        precision: str | int | None = None,
        scaler_kwargs: dict[str, Any] | None = None,
        devices: int | str | list[int] | None = None,
        accelerator: str | Accelerator | None = None,
        strategy: str | Strategy | None = None,
        max_epochs: int | None = None,
        max_steps: int = -1,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        fast_dev_run: bool | int = False,
        num_sanity_val_steps: int | None = None,
        check_val_every_n_epoch: int | None = 1,
        val_check_interval: int | float | None = None,
        uneven_batches: str = "drop",
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
        log_every_n_steps: int | None = None,
        nonfinite_loss: str = "warn",
        callbacks: Callback | list[Callback] | None = None,
        logger: Logger | list[Logger] | bool | None = None,
        enable_progress_bar: bool | None = None,
        default_root_dir: str | os.PathLike[str] | None = None,
        inference_mode: bool = True,
        **others: Unpack[OptionArguments],
    ) -> None:
        self.options, unknown = read_options(others)
        check_arguments(unknown, Trainer)
        logger, enable_progress_bar, num_sanity_val_steps, log_every_n_steps = self.options.bare(
            logger, enable_progress_bar, num_sanity_val_steps, log_every_n_steps
        )
        count = check_count("devices", read_devices(devices), 1)
        chosen, options = read_backend(backend, accelerator, strategy, backend_options)
        chosen, self.precision = resolve(chosen, precision, count)
        self.backend = make_backend(chosen, options)
        self.backend.precision, self.backend.scaler_kwargs = self.precision, scaler_kwargs
        self.backend.devices = count
        self._read_ends(fast_dev_run, max_epochs, max_steps)
        self._read_limits(limit_train_batches, limit_val_batches, limit_test_batches, limit_predict_batches)
        self._read_validation(num_sanity_val_steps, check_val_every_n_epoch, val_check_interval)
        self.uneven_batches = check_choice("uneven_batches", str(uneven_batches), "drop", "finish")
        self.accumulate_grad_batches = check_count("accumulate_grad_batches", accumulate_grad_batches, 1)
        self.gradient_clip_val = None if gradient_clip_val is None else check_clip_value(gradient_clip_val)
        self.gradient_clip_algorithm = check_choice("gradient_clip_algorithm", gradient_clip_algorithm, "norm", "value")
        self.nonfinite_loss = check_choice("nonfinite_loss", str(nonfinite_loss), "warn", "stop", "ignore")
        self.inference_mode = inference_mode
        self._read_watching(callbacks, logger, enable_progress_bar is not False, log_every_n_steps, default_root_dir)
        self.progress = Progress()

    def _read_watching(self, callbacks: Any, logger: Any, bar: bool, every: int | None, root: Any) -> None:
        """Set who watches a run: callbacks, loggers, the bar."""
        self.log_every_n_steps = check_count("log_every_n_steps", 50 if every is None else every, 0)
        root = root or Path.cwd()
        self.default_root_dir = os.path.expanduser(root)  # noqa: PTH111  # a Path would change "s3://bucket"
        loggers = as_loggers(logger, self.default_root_dir)
        self.loggers = [SilentLogger()] if self.fast_dev_run and loggers else loggers
        self.callbacks = _callbacks(callbacks, self.options, bar)

    def _read_ends(self, fast_dev_run: bool | int, max_epochs: int | None, max_steps: int | None) -> None:
        """Set how long a fit goes on; a fast run is one epoch of so many batches, whatever else was asked for."""
        check_count("fast_dev_run", int(fast_dev_run), 0)
        self.fast_dev_run = fast_dev_run
        self.max_epochs = check_count("max_epochs", max_epochs, -1)
        self.max_steps = -1 if max_steps is None else check_count("max_steps", max_steps, -1)
        if fast_dev_run:
            self.max_epochs, self.max_steps = 1, -1

    def _read_limits(self, train: Any, val: Any, test: Any, predict: Any) -> None:
        quick = int(self.fast_dev_run)
        train = self.options.overfit_batches or train
        val = self.options.overfit_batches or val
        self.limit_train_batches = quick or check_limit("limit_train_batches", train)
        self.limit_val_batches = quick or check_limit("limit_val_batches", val)
        self.limit_test_batches = quick or check_limit("limit_test_batches", test)
        self.limit_predict_batches = quick or check_limit("limit_predict_batches", predict)

    def _read_validation(self, sanity: int | None, epochs: int | None, interval: int | float | None) -> None:
        self.num_sanity_val_steps = 2 if sanity is None else check_count("num_sanity_val_steps", sanity, -1)
        self.check_val_every_n_epoch = check_count("check_val_every_n_epoch", epochs, 1)
        self.val_check_interval = check_interval(interval, epochs)
        if self.fast_dev_run:  # it validates, after the last of its batches
            self.num_sanity_val_steps, self.check_val_every_n_epoch, self.val_check_interval = 0, 1, None

    # ---------------------------------------------------------------- what users call

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        *,
        steps: int | None = None,
    ) -> None:
        """Train `model`.

        Args:
            model: the module.
            train_dataloaders: any iterable of batches, or a LightningDataModule. Without one (and
                without ``train_dataloader`` on the module) batches are None, for `steps` or `max_steps`.
            val_dataloaders: one iterable or a list of them.
            datamodule: gives the loaders instead.
            steps: training steps of this call; an epoch has so many if there is no loader.

        Raises:
            UnsupportedCombinationError: before the first batch, with all violations.
            ConfigurationError: for what the module returns or the loaders hold.

        Example:
            >>> trainer = Trainer(max_epochs=2, enable_progress_bar=False)
            >>> trainer.fit(module, data)  # any iterable of batches; here there are four
            >>> trainer.global_step
            8
        """
        if isinstance(train_dataloaders, LightningDataModule):
            train_dataloaders, datamodule = None, train_dataloaders
        check_count("steps", steps, 1)
        plan = partial(plan_fit, train=train_dataloaders, val=val_dataloaders, steps=steps)
        with started_run(self, "fit", model, datamodule, plan) as run:
            self._train(run)

    def validate(
        self, model: LightningModule | None = None, dataloaders: Any = None, datamodule: Any = None
    ) -> list[dict[str, float]]:
        """Run ``validation_step`` over the loaders; returns one dict of epoch metrics per loader.

        Example:
            >>> trainer.validate(module, data)[0].keys()
            dict_keys(['val_loss'])
        """
        return self._evaluate("validate", model, dataloaders, datamodule)

    def test(
        self, model: LightningModule | None = None, dataloaders: Any = None, datamodule: Any = None
    ) -> list[dict[str, float]]:
        """Run ``test_step`` over the loaders; returns one dict of epoch metrics per loader.

        Example:
            >>> trainer.test(module, data)[0].keys()
            dict_keys(['val_loss'])
        """
        return self._evaluate("test", model, dataloaders, datamodule)

    def predict(
        self, model: LightningModule | None = None, dataloaders: Any = None, datamodule: Any = None
    ) -> list[Any]:
        """Return what ``predict_step`` returned per batch (a list of lists for several loaders).

        Example:
            >>> [prediction.shape for prediction in trainer.predict(module, data[:2])]
            [torch.Size([2, 1]), torch.Size([2, 1])]
        """
        return self._evaluate("predict", model, dataloaders, datamodule)

    def _evaluate(self, stage: str, model: LightningModule | None, loaders: Any, datamodule: Any) -> list[Any]:
        if isinstance(loaders, LightningDataModule):
            loaders, datamodule = None, loaders
        with started_run(self, stage, self.lightning_module if model is None else model, datamodule) as run:
            found = run.read_loaders(stage, loaders)
            if not found:
                raise ConfigurationError(explain(f"loaders to {stage}", "none", f"trainer.{stage}(model, loader)"))
            run.loaders[stage] = found
            return evaluate(run, stage, found)

    # ---------------------------------------------------------------- the loop

    def _train(self, run: Run) -> None:
        progress, plan, metrics = self.progress, run.plan, run.metrics
        training_step = accept_arguments(run.module.training_step, 2)
        automatic = AutomaticStep(run, training_step) if run.module.automatic_optimization else None
        run.call("on_fit_start")
        if plan.val_loaders and plan.sanity_batches != 0:
            run.call("on_sanity_check_start")
            evaluate(run, "sanity", plan.val_loaders)
            run.call("on_sanity_check_end")
        with metrics.stage("train"):
            run.call("on_train_start")
            first = progress.epoch
            while not self._finished(run) and not (plan.max_epochs is not None and progress.epoch >= plan.max_epochs):
                reload_if_due(run, progress.epoch - first)
                self._train_epoch(run, automatic or training_step)
                metrics.reduce_epoch()
                run.call("on_train_epoch_end")
                metrics.send_epoch(progress.global_step, progress.epoch)
                if automatic is not None:
                    automatic.step_schedulers("epoch", progress.epoch + 1)
                progress.epoch += 1
            self._look_at(run, metrics.flush(progress.global_step, progress.epoch))
        run.call("on_train_end")
        run.call("on_fit_end")

    def _train_epoch(self, run: Run, training_step: Callable[[Any, int], Any]) -> None:
        backend, metrics, life, plan, progress = self.backend, run.metrics, run.life, run.plan, self.progress
        at_start, at_end = run.hooks["on_train_batch_start"], run.hooks["on_train_batch_end"]
        run.call("on_train_epoch_start")
        progress.batch_idx, progress.first_batch = -1, progress.batches
        for index, (batch, last) in enumerate(plan.epoch(progress.epoch)):
            progress.batch_idx, progress.is_last_batch = index, last
            batch = run.transfer(batch, 0)
            metrics.set_batch(batch)
            if at_start and -1 in run.call("on_train_batch_start", batch, index):
                break
            metrics.hook("training_step")
            with backend.forward_context():
                outputs = training_step(batch, index)
            backend.step_boundary()
            if life.stepped:
                progress.global_step += 1
                life.stepped = False
            if at_end:
                run.call("on_train_batch_end", outputs, batch, index)
            if life.last_loss is not None:
                metrics.checks["loss"] = life.last_loss
            checks = metrics.flush_step(progress.global_step, progress.epoch)
            if checks:
                self._look_at(run, checks)
            progress.batches += 1
            if plan.val_loaders and self._validation_due(run):
                evaluate(run, "validate", plan.val_loaders)
            plan.steps_left -= 1
            if self._finished(run):
                break
        if progress.batch_idx < 0:
            raise empty_loader("training")

    def _finished(self, run: Run) -> bool:
        plan = run.plan
        done = plan.steps_left <= 0 or 0 <= self.max_steps <= self.progress.global_step
        stopped = self.should_stop and self.options.may_stop(self.progress.epoch, self.progress.global_step)
        return done or stopped or plan.batches == 0

    def _look_at(self, run: Run, checks: dict[str, float]) -> None:
        """Look at the loss of a log point, if looking earlier would have meant to wait for it."""
        if "loss" in checks:
            run.life.check_finite(checks["loss"])

    def _validation_due(self, run: Run) -> bool:
        """Return whether validation follows the training batch that just ended."""
        every, epochs, progress = run.plan.val_every, self.check_val_every_n_epoch, self.progress
        if epochs is None:  # batches are counted across epochs
            return progress.batches % (every or 1) == 0
        if (progress.epoch + 1) % epochs:
            return False
        return progress.is_last_batch if every is None else (progress.batch_idx + 1) % every == 0


def _callbacks(callbacks: Any, options: Options, bar: bool) -> list[Callback]:
    given = [] if callbacks is None else list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
    for callback in given:
        if not isinstance(callback, Callback):
            fix = "class MyCallback(xtrain.Callback): ..."
            raise ConfigurationError(explain("callbacks derived from xtrain.Callback", type(callback).__name__, fix))
    given += options.callbacks()
    if bar and not any(isinstance(c, ProgressBar) for c in given):
        given.append(ProgressBar())
    return given
