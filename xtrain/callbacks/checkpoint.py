"""Saves checkpoints while a module is trained, and keeps the best ones."""

from __future__ import annotations

import math
import os
import time
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from xtrain.callbacks.base import Callback
from xtrain.checkpoint.format import is_checkpoint
from xtrain.checkpoint.naming import DEFAULT, fields_of, formatted, free
from xtrain.checkpoint.places import SUFFIX, place
from xtrain.checkpoint.stores import store_of
from xtrain.errors import CheckpointError, ConfigurationError, explain

if TYPE_CHECKING:
    from xtrain.module import LightningModule
    from xtrain.trainer import Trainer

FOLDER = "checkpoints"
LAST = "last"


class ModelCheckpoint(Callback):
    """Saves checkpoints, each a folder that ends in ``.ckpt``, and removes those that are no longer wanted.

    A checkpoint is written when a batch with all that belongs to it is done: its callbacks, log rows, validation. What
    falls on the last batch of an epoch is written after the end of the epoch. A save that fails warns, and the
    training goes on. ``last.ckpt`` is a link to the newest one.

    Args:
        dirpath: the folder, or a URL of fsspec (``"s3://bucket/run"``); default: ``checkpoints`` in the Trainer's
            ``default_root_dir``.
        filename: a template such as ``"{epoch}-{val_loss:.2f}"``; default: ``"{epoch}-{step}"``. ``step`` is
            ``trainer.global_step``, which counts training steps.
        monitor: the metric in ``trainer.callback_metrics``, ``"epoch"`` or ``"step"``, that says which are best; None
            takes the newest.
        verbose: say what is saved.
        save_last: keep ``last.ckpt``.
        save_top_k: how many to keep; -1 is all of them, 0 none but the last.
        save_weights_only: leave out what only a training needs.
        mode: ``"min"`` or ``"max"``, of `monitor`.
        auto_insert_metric_name: write ``epoch=3`` for ``{epoch}`` in `filename`.
        every_n_train_steps: save every so many training steps.
        train_time_interval: save after so much time.
        every_n_epochs: save every so many epochs; the default is every one, if neither steps nor time are given.
        save_on_train_epoch_end: save at the end of those epochs (True), or after each validation in them (False). None
            takes validations where they and epochs do not come one to one.
        save_on_exception: save when the training ends by an exception, for looking at it.
        enable_version_counter: write beside a checkpoint of the same name, with ``-v1``, and not in its place.
        background: copy the state, and write it while the training goes on.

    Raises:
        ConfigurationError: for arguments that mean nothing.

    Example:
        >>> trainer = Trainer(callbacks=[ModelCheckpoint("run", monitor="val_loss", save_top_k=2)])
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | None = None,
        save_top_k: int = 1,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        save_on_exception: bool = False,
        enable_version_counter: bool = True,
        background: bool = False,
    ) -> None:
        _check("mode 'min' or 'max'", mode in ("min", "max"), mode, "mode='min'")
        fine = isinstance(save_top_k, int) and save_top_k >= -1
        _check("save_top_k of at least -1", fine, save_top_k, "save_top_k=3")
        _check_times(every_n_train_steps, every_n_epochs, train_time_interval)
        link = save_last in (None, True, False, "link")
        _check("save_last as True, False or 'link'", link, save_last, "save_last=True")
        _check("a filename as text", isinstance(filename, str | None), filename, "filename='{epoch}-{step}'")
        formatted(filename or DEFAULT, {}, auto_insert_metric_name)
        watched = monitor is not None or save_top_k < 2
        _check("a monitor for save_top_k above 1", watched, f"save_top_k={save_top_k}", "save_top_k=-1")
        timed = every_n_train_steps or train_time_interval is not None
        self.given_dirpath, self.filename, self.verbose = dirpath, filename, verbose
        self.monitor, self.mode = monitor, mode
        self.save_last, self.save_top_k, self.save_weights_only = save_last, save_top_k, save_weights_only
        self.every_n_train_steps, self.train_time_interval = every_n_train_steps or 0, train_time_interval
        self.every_n_epochs = every_n_epochs if every_n_epochs is not None else int(not timed)
        self.save_on_exception, self.background, self._counter = save_on_exception, background, enable_version_counter
        self._insert, self._at_epoch_end, self._validated = auto_insert_metric_name, save_on_train_epoch_end, False
        self.dirpath = "" if dirpath is None else str(place(dirpath))
        self.best_model_path = self.last_model_path = ""
        self.best_model_score: float | None = None
        self.best_k_models: dict[str, float] = {}
        self._writing: Any = None
        self._lock: Any = None
        self._seen_step: int | None = None
        self._next_step = 0.0  # before this one nothing is due after a batch
        self._coming: tuple[str, float | None] | None = None  # what is being saved has to know of itself

    @property
    def state_key(self) -> str:
        """The class, with what tells several of them apart."""
        facts = {"monitor": self.monitor, "mode": self.mode, "every_n_train_steps": self.every_n_train_steps}
        return f"{type(self).__qualname__}{facts | {'every_n_epochs': self.every_n_epochs}}"

    def state_dict(self) -> dict[str, Any]:
        """Return what is known about the checkpoints so far."""
        known = dict(self.best_k_models)
        path, score = self._coming or (self.last_model_path, None)
        if self._coming is not None and score is not None:
            known[path] = score
        return {"best_k_models": known, "last_model_path": path}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the best checkpoints of an earlier run, those that are still there."""
        scores = {path: float(score) for path, score in state.get("best_k_models", {}).items()}
        self.best_k_models = {path: score for path, score in scores.items() if is_checkpoint(place(path))}
        self.last_model_path = str(state.get("last_model_path") or "")
        self._find_best()

    # ---------------------------------------------------------------- when

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Find the folder, and make sure that no other run writes to it."""
        folder = place(self.given_dirpath or place(trainer.default_root_dir) / FOLDER)
        self.dirpath = str(folder)
        self._clock = time.monotonic()
        self._saved_step = self._saved_epoch = -1
        self._seen_step, self._coming, self._next_step, self._validated = None, None, 0.0, False
        if stage == "fit" and trainer.is_global_zero:
            self._lock = store_of(folder).hold(folder, trainer)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Save a training that fails, if that is asked for and this is its only process."""
        if self._writing is not None:
            self._writing.hurry()  # other processes may have ended without their part
        if self.save_on_exception and trainer.training and not isinstance(exception, SystemExit):
            if trainer.world_size > 1:
                warnings.warn("Nothing is saved on the exception: the other processes do not come here.", stacklevel=2)
                return
            self._save(trainer, f"exception-epoch={trainer.current_epoch}-step={trainer.global_step}", exception=True)

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Wait for what is still being written, and let go of the folder."""
        self.wait(agree=False)  # after an error the other processes do not come here
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Wait for what is still being written."""
        self.wait()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Remember that there is something to save, if validations are counted."""
        self._validated = not trainer.sanity_checking
        self._next_step = 0.0

    def at_safe_point(self, trainer: Trainer, kind: str) -> None:
        """Save if it is time; called by the loop, see `xtrain.checkpoint.preempt.SafePoints.reach`."""
        if self._writing is not None:
            self._writing.tell()
        if kind == "batch" and trainer.progress.global_step < self._next_step:
            return  # what a step costs between two saves
        step, epoch = trainer.global_step, trainer.current_epoch
        due = [self._steps_passed(step), self._epochs_passed(trainer, kind), self._time_passed(trainer)]
        if any(due) and (step, epoch) != (self._saved_step, self._saved_epoch):
            self._saved_step, self._saved_epoch = step, epoch
            self._clock = time.monotonic()
            self._save(trainer, self.format_checkpoint_name(self._named(trainer)))

    def _steps_passed(self, step: int) -> bool:
        """Return whether a multiple of the interval was passed since the last point."""
        every = self.every_n_train_steps
        if self.train_time_interval is None:
            self._next_step = (step // every + 1) * every if every else math.inf
        before, self._seen_step = step - 1 if self._seen_step is None else self._seen_step, step
        return bool(self.every_n_train_steps) and step // self.every_n_train_steps > before // self.every_n_train_steps

    def _epochs_passed(self, trainer: Trainer, kind: str) -> bool:
        validated, self._validated = self._validated, False
        due = kind != "batch" if self._counts_epochs(trainer) else validated
        epoch = trainer.current_epoch + (kind != "epoch")
        return bool(due and self.every_n_epochs) and epoch % self.every_n_epochs == 0

    def _counts_epochs(self, trainer: Any) -> bool:
        if self._at_epoch_end is not None:
            return self._at_epoch_end
        one_to_one = trainer.check_val_every_n_epoch == 1 and trainer.val_check_interval in (None, 1.0)
        return one_to_one or not trainer.run.plan.val_loaders

    def _time_passed(self, trainer: Trainer) -> bool:
        if self.train_time_interval is None:
            return False
        passed = time.monotonic() - self._clock >= self.train_time_interval.total_seconds()
        return passed if trainer.world_size == 1 else trainer.broadcast(passed)

    def save_preempted(self, trainer: Trainer) -> str:
        """Save a run that is told to end, whatever the monitor says; returns the path."""
        self.wait()
        name = f"preempted-epoch={trainer.current_epoch}-step={trainer.global_step}.ckpt"
        path = free(trainer, self.dirpath, name)
        self._coming = (str(path), None)
        trainer._write_checkpoint(path, False, False, False)
        return str(path)

    # ---------------------------------------------------------------- what

    def format_checkpoint_name(self, metrics: dict[str, Any]) -> str:
        """Return the name of a checkpoint, without its ending.

        Args:
            metrics: values by name, ``epoch`` and ``step`` among them; what is missing is 0.
        """
        return formatted(self.filename or DEFAULT, metrics, self._insert)

    def _named(self, trainer: Trainer) -> dict[str, Any]:
        """Return what the name may have in it; a metric is only read if the name has it: that waits for the device."""
        fields = fields_of(self.filename or DEFAULT)
        metrics = trainer.callback_metrics if fields - {"epoch", "step"} else {}
        values = {name: float(value) for name, value in metrics.items()}
        return {**values, "epoch": trainer.current_epoch, "step": trainer.global_step}

    def _save(self, trainer: Trainer, name: str, exception: bool = False) -> None:
        self.wait()
        score = None if exception else self._score(trainer)
        if not exception and not self._is_wanted(score) and not self.save_last:
            return
        path = free(trainer, self.dirpath, f"{name}{SUFFIX}", self._counter)
        rank = float(trainer.global_step) if score is None else score  # without a monitor the newest is best
        self._coming = (str(path), rank if self.save_top_k else None)
        try:
            self._writing = trainer._write_checkpoint(path, self.save_weights_only, self.background, exception)
        except CheckpointError as error:
            warnings.warn(f"The training goes on without this checkpoint. {error}", stacklevel=2)
            return
        self._pending = (trainer, str(path), rank, exception)
        if self._writing is None:
            self._keep(*self._pending)

    def wait(self, agree: bool = True) -> None:
        """Wait for a checkpoint that is being written in the background.

        Args:
            agree: whether all ranks come here, and hear from rank 0 whether it is complete.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        writing.join()
        writing.tell()
        problem = self._pending[0].broadcast(writing.problem) if agree else writing.problem
        if not problem:
            self._keep(*self._pending)

    def _keep(self, trainer: Trainer, path: str, score: float, exception: bool) -> None:
        """Count a checkpoint that is complete, and remove those that are not wanted any more."""
        self._coming = None
        if exception:
            return
        before, self.last_model_path = self.last_model_path, path
        if self.save_top_k:
            self.best_k_models[path] = score
        self._find_best()
        unwanted = [p for p in self._ranked()[self.save_top_k :] if p != path or not self.save_last]
        unwanted = unwanted if self.save_top_k >= 0 else []
        if before and before not in self.best_k_models and before != path:
            unwanted.append(before)
        for old in unwanted:
            self.best_k_models.pop(old, None)
        if trainer.is_global_zero:
            self._tidy(path, unwanted)
        if self.verbose:
            trainer.print(f"Saved {path}.")

    def _tidy(self, path: str, unwanted: list[str]) -> None:
        """Let ``last.ckpt`` stand for `path`, and remove what is not wanted any more; what fails is only told."""
        folder = place(self.dirpath)
        store = store_of(folder)
        try:
            if self.save_last:
                store.link(folder / f"{LAST}.ckpt", place(path))
            for old in unwanted:
                store.remove(place(old))
        except OSError as error:
            warnings.warn(f"{folder} was not tidied: {type(error).__name__}: {error}", stacklevel=2)

    def _ranked(self) -> list[str]:
        newest_first = self.monitor is None or self.mode == "max"
        return sorted(self.best_k_models, key=lambda path: self.best_k_models[path], reverse=newest_first)

    def _find_best(self) -> None:
        ranked = self._ranked()
        self.best_model_path = ranked[0] if ranked else ""
        self.best_model_score = self.best_k_models[ranked[0]] if ranked and self.monitor is not None else None

    def _score(self, trainer: Trainer) -> float | None:
        if self.monitor is None:
            return None
        counts = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        value = trainer.callback_metrics.get(self.monitor, counts.get(self.monitor))
        if value is None:
            received = f"only {sorted(trainer.callback_metrics)}"
            fix = f"self.log({self.monitor!r}, value) in validation_step, or ModelCheckpoint(monitor=None)"
            wanted = f"the metric {self.monitor!r} of ModelCheckpoint in trainer.callback_metrics"
            raise ConfigurationError(explain(wanted, received, fix))
        score = trainer.broadcast(float(value))
        return score if score == score else (float("inf") if self.mode == "min" else float("-inf"))

    def _is_wanted(self, score: float | None) -> bool:
        """Return whether a checkpoint of this `score` belongs to the best."""
        if self.save_top_k == -1 or (
            self.save_top_k > 0 and (score is None or len(self.best_k_models) < self.save_top_k)
        ):
            return True
        if self.save_top_k == 0 or score is None:
            return False
        worst = self.best_k_models[self._ranked()[self.save_top_k - 1]]
        return score < worst if self.mode == "min" else score > worst


def _check(expected: str, holds: bool, received: Any, fix: str) -> None:
    if not holds:
        raise ConfigurationError(explain(expected, repr(received), f"ModelCheckpoint({fix})"))


def _check_times(steps: Any, epochs: Any, interval: Any) -> None:
    """Check the arguments that say when to save."""
    for flag, value in (("every_n_train_steps", steps), ("every_n_epochs", epochs)):
        good = value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)
        _check(f"{flag} as an int of at least 0", good, value, f"{flag}=100")
    timed = interval is None or isinstance(interval, timedelta)
    _check("train_time_interval as a timedelta", timed, interval, "train_time_interval=timedelta(minutes=30)")
