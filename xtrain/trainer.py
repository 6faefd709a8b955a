"""`Trainer`: its settings and what users call; the loop is in `xtrain.run.training`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from xtrain.callbacks.base import Callback, check_callbacks
from xtrain.callbacks.progress import ProgressBar
from xtrain.checkpoint.preempt import preemptible, safe_points
from xtrain.checkpoint.verbs import CheckpointVerbs, with_model_checkpoint
from xtrain.checks import (
    check_choice,
    check_clip_value,
    check_count,
    check_folder,
    check_interval,
    check_limit,
    check_options,
    check_switch,
)
from xtrain.compat.arguments import check_arguments, read_devices
from xtrain.compat.backends import read_backend
from xtrain.compat.environment import environment_defaults
from xtrain.compat.strategies import Accelerator, Strategy
from xtrain.contract import Backend
from xtrain.data.datamodule import LightningDataModule
from xtrain.data.sharding import recorded
from xtrain.errors import ConfigurationError, explain
from xtrain.launch.auto import resolve
from xtrain.loggers import Logger, as_loggers
from xtrain.loggers.silent import SilentLogger
from xtrain.module import LightningModule
from xtrain.registry import check_backend, make_backend
from xtrain.run.checks import check_datamodule
from xtrain.run.evaluation import evaluate
from xtrain.run.options import OptionArguments, Options, read_options
from xtrain.run.plan import plan_fit
from xtrain.run.rehearsed import Rehearsed
from xtrain.run.setup import started_run
from xtrain.run.state import Progress
from xtrain.run.training import train


class Trainer(CheckpointVerbs, Rehearsed):
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
        max_steps: stop at this `global_step`; -1 is unlimited.
        step_counting: what `global_step` counts: ``"training"`` steps in which an optimizer stepped, or every call
            of an optimizer's ``step``, at once (``"optimizer"``, as Lightning does).
        limit_train_batches: batches per epoch, as a number or a fraction; so do the other limits.
        limit_val_batches: of validation, as for training.
        limit_test_batches: of testing.
        limit_predict_batches: of prediction.
        fast_dev_run: run so many batches (True: 1) of everything; loggers swallow what they get.
        num_sanity_val_steps: validation batches before training; -1 is all of them.
        check_val_every_n_epoch: epochs between validations; None counts `val_check_interval` across epochs.
        val_check_interval: training batches (or fraction of an epoch, or a time as `max_time`) between validations.
        uneven_batches: when ranks have unequally many batches, an epoch ends for all with the first that
            has none (``"drop"``) or the last (``"finish"``; the others repeat their last batch).
        accumulate_grad_batches: batches per step of automatic optimization.
        gradient_clip_val: clips in automatic optimization; 0 and None do not.
        gradient_clip_algorithm: ``"norm"`` or ``"value"``.
        log_every_n_steps: training steps between two reads of logged values.
        check_replicas: on several processes, compare parameters and buffers at the end of each epoch (``"epoch"``),
            or not (``"off"``). Batch statistics differ by design.
        nonfinite_loss: ``"warn"`` once, ``"stop"`` or ``"ignore"`` when a loss is NaN or infinite. On
            asynchronous devices the latest loss is looked at every `log_every_n_steps`.
        callbacks: one or several.
        logger: True for a `CSVLogger`, one or several loggers, or None.
        enable_progress_bar: show a progress bar on rank 0.
        enable_checkpointing: True adds a `ModelCheckpoint`; nothing is saved otherwise, unless one is given.
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
        step_counting: str = "training",
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        fast_dev_run: bool | int = False,
        num_sanity_val_steps: int | None = None,
        check_val_every_n_epoch: int | None = 1,
        val_check_interval: int | float | str | timedelta | dict[str, float] | None = None,
        uneven_batches: str = "drop",
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
        log_every_n_steps: int | None = None,
        nonfinite_loss: str = "warn",
        check_replicas: str = "epoch",
        callbacks: Callback | list[Callback] | None = None,
        logger: Logger | list[Logger] | bool | None = None,
        enable_progress_bar: bool | None = None,
        enable_checkpointing: bool | None = None,
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
        check_options("backend_options", backend_options)
        chosen, options = read_backend(check_backend(backend), accelerator, strategy, backend_options)
        chosen, self.precision, self.origin = resolve(chosen, precision, count)
        self.backend = make_backend(chosen, options)
        self.backend.precision, self.backend.devices = self.precision, count
        self.backend.scaler_kwargs = check_options("scaler_kwargs", scaler_kwargs)
        self._read_ends(fast_dev_run, max_epochs, max_steps, step_counting)
        self._read_limits(limit_train_batches, limit_val_batches, limit_test_batches, limit_predict_batches)
        self._read_validation(num_sanity_val_steps, check_val_every_n_epoch, val_check_interval)
        self.uneven_batches = check_choice("uneven_batches", str(uneven_batches), "drop", "finish")
        self.accumulate_grad_batches = check_count("accumulate_grad_batches", accumulate_grad_batches, 1)
        self.gradient_clip_val = check_clip_value(gradient_clip_val) if gradient_clip_val else None  # 0: no clipping
        self.gradient_clip_algorithm = check_choice("gradient_clip_algorithm", gradient_clip_algorithm, "norm", "value")
        self.nonfinite_loss = check_choice("nonfinite_loss", str(nonfinite_loss), "warn", "stop", "ignore")
        self.check_replicas = check_choice("check_replicas", str(check_replicas), "epoch", "off")
        self.inference_mode = check_switch("inference_mode", inference_mode)
        self._read_watching(callbacks, logger, enable_progress_bar, log_every_n_steps, default_root_dir)
        self._start_afresh(enable_checkpointing)

    def _start_afresh(self, saves: bool | None) -> None:
        self.callbacks = with_model_checkpoint(self.callbacks, saves)
        self.progress = Progress()

    def _read_watching(self, callbacks: Any, logger: Any, bar: bool | None, every: int | None, root: Any) -> None:
        """Set who watches a run: callbacks, loggers, the bar."""
        self.log_every_n_steps = check_count("log_every_n_steps", 50 if every is None else every, 0)
        root = check_folder("default_root_dir", root) or Path.cwd()
        self.default_root_dir = os.path.expanduser(root)  # noqa: PTH111  # a Path would change "s3://bucket"
        loggers = as_loggers(logger, self.default_root_dir)
        self.loggers = [SilentLogger()] if self.fast_dev_run and loggers else loggers
        shown = bar is None or check_switch("enable_progress_bar", bar)
        self.callbacks = _callbacks(callbacks, self.options, shown)

    def _read_ends(self, fast_dev_run: bool | int, max_epochs: int | None, max_steps: int | None, counts: str) -> None:
        """Set how long a fit goes on; a fast run is one epoch of so many batches, whatever else was asked for."""
        check_count("fast_dev_run", int(fast_dev_run) if isinstance(fast_dev_run, bool) else fast_dev_run, 0)
        self.fast_dev_run = fast_dev_run or False
        self.max_epochs = check_count("max_epochs", max_epochs, -1)
        self.max_steps = -1 if max_steps is None else check_count("max_steps", max_steps, -1)
        self.step_counting = check_choice("step_counting", str(counts), "training", "optimizer")
        if fast_dev_run:
            self.max_epochs, self.max_steps = 1, -1 if self.max_steps < 0 else max(self.max_steps, int(fast_dev_run))

    def _read_limits(self, train: Any, val: Any, test: Any, predict: Any) -> None:
        quick = int(self.fast_dev_run)
        train = self.options.overfit_batches or train
        val = self.options.overfit_batches or val
        self.limit_train_batches = quick or check_limit("limit_train_batches", train)
        self.limit_val_batches = quick or check_limit("limit_val_batches", val)
        self.limit_test_batches = quick or check_limit("limit_test_batches", test)
        self.limit_predict_batches = quick or check_limit("limit_predict_batches", predict)

    def _read_validation(self, sanity: int | None, epochs: int | None, interval: Any) -> None:
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
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
        *,
        steps: int | None = None,
        load: tuple[str, ...] | None = None,
    ) -> None:
        """Train `model`.

        Args:
            model: the module.
            train_dataloaders: any iterable of batches, or a LightningDataModule. Without one (and
                without ``train_dataloader`` on the module) batches are None, for `steps` or `max_steps`.
            val_dataloaders: one iterable or a list of them.
            datamodule: gives the loaders instead.
            ckpt_path: a checkpoint to go on from; ``"last"`` is the newest complete one (none: the training begins),
                ``"best"`` that of a `ModelCheckpoint` of this Trainer.
            weights_only: False lets a file of Lightning run code; never for a file of others.
            steps: training steps of this call; an epoch has so many if there is no loader.
            load: the parts to load (``"module"``, ``"optimizers"``, ``"schedulers"``, ``"callbacks"``, ``"data"``),
                as far as they fit: what does not is listed. Default: everything, and all of it must fit.

        Raises:
            CheckpointError: for a checkpoint that is damaged, or of another training.
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
        given = {"train_dataloader": train_dataloaders, "val_dataloader": val_dataloaders}
        check_datamodule(given, datamodule)
        check_count("steps", steps, 1)
        plan = partial(plan_fit, train=train_dataloaders, val=val_dataloaders, steps=steps)
        resume = self._resumption(ckpt_path, load, weights_only)
        with (
            preemptible(self) as preemption,
            started_run(self, "fit", model, datamodule, plan, resume) as run,
            safe_points(run, preemption),
        ):
            train(run)

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: Any = None,
        verbose: bool | None = None,
        datamodule: Any = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Run ``validation_step`` over the loaders; returns a dict of metrics per loader.

        Args:
            model: the module; default: that of the last run.
            dataloaders: one iterable of batches or several.
            ckpt_path: a checkpoint to take the weights from: a path, ``"last"`` or ``"best"``.
            verbose: print the metrics, too; None does where a progress bar is shown.
            datamodule: gives the loaders instead.
            weights_only: as in `fit`.

        Example:
            >>> trainer.validate(module, data)[0].keys()
            dict_keys(['val_loss'])
        """
        return self._told(verbose, self._evaluate("validate", model, dataloaders, datamodule, ckpt_path, weights_only))

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: Any = None,
        verbose: bool | None = None,
        datamodule: Any = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Run ``test_step`` over the loaders; arguments and what is returned are those of `validate`.

        Example:
            >>> trainer.test(module, data)[0].keys()
            dict_keys(['val_loss'])
        """
        return self._told(verbose, self._evaluate("test", model, dataloaders, datamodule, ckpt_path, weights_only))

    def predict(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        return_predictions: bool | None = None,
        ckpt_path: Any = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Return what ``predict_step`` returned per batch (a list of lists for several loaders).

        Args:
            model: the module; default: that of the last run.
            dataloaders: one iterable of batches or several.
            datamodule: gives the loaders instead.
            return_predictions: False keeps none and returns None, for a callback that writes them.
            ckpt_path: a checkpoint to take the weights from: a path, ``"last"`` or ``"best"``.
            weights_only: as in `fit`.

        Example:
            >>> [prediction.shape for prediction in trainer.predict(module, data[:2])]
            [torch.Size([2, 1]), torch.Size([2, 1])]
        """
        kept = return_predictions is not False
        found = self._evaluate("predict", model, dataloaders, datamodule, ckpt_path, weights_only, kept)
        return found if kept else None

    def _told(self, verbose: bool | None, results: list[dict[str, float]]) -> list[dict[str, float]]:
        if verbose is None:
            verbose = self.progress_bar_callback is not None
        for index, result in enumerate(results if verbose else ()):
            values = ", ".join(f"{name}={value:.6g}" for name, value in result.items())
            self.print(f"loader {index}: {values}" if len(results) > 1 else values)
        return results

    def _evaluate(
        self,
        stage: str,
        model: LightningModule | None,
        loaders: Any,
        datamodule: Any,
        ckpt_path: Any,
        weights_only: bool | None,
        kept: bool = True,
    ) -> list[Any]:
        if isinstance(loaders, LightningDataModule):
            loaders, datamodule = None, loaders
        check_datamodule({f"{'val' if stage == 'validate' else stage}_dataloader": loaders}, datamodule)
        module = self.lightning_module if model is None else model
        resume = self._resumption(ckpt_path, None, weights_only)
        with started_run(self, stage, module, datamodule, resume=resume) as run:
            found = run.read_loaders(stage, loaders)
            if not found:
                raise ConfigurationError(explain(f"loaders to {stage}", "none", f"trainer.{stage}(model, loader)"))
            run.loaders[stage] = found
            run.keeps_predictions = kept or any(getattr(c, "needs_predictions", False) for c in self.callbacks)
            if stage == "predict" and any(getattr(c, "needs_indices", False) for c in self.callbacks):
                pairs = [recorded(loader) for loader in found]
                found, run.indices = [loader for loader, _ in pairs], [seen for _, seen in pairs]
            return evaluate(run, stage, found)


def _callbacks(callbacks: Any, options: Options, bar: bool) -> list[Callback]:
    given = [] if callbacks is None else list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
    check_callbacks(given)
    given += options.callbacks(given)
    if bar and not any(isinstance(c, ProgressBar) for c in given):
        given.append(ProgressBar())
    return given
