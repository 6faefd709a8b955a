"""Counters of a training under the names of Lightning's loops, for modules that read or set them.

Reading goes to `xtrain.run.state.Progress`, and so does writing: whoever sets a counter wants to go on from there.
"""

from __future__ import annotations

from typing import Any


class _Count:
    """The stages of one count: here all are the same number, but for what is ready before it is finished.

    Args:
        progress: holds the number.
        name: of its attribute.
        running: what is added to ``ready`` and ``started`` while the next one is under way.
    """

    _progress: Any
    _name: str
    _running: int

    def __init__(self, progress: Any, name: str, running: int = 0) -> None:
        vars(self).update(_progress=progress, _name=name, _running=running)

    def __getattr__(self, stage: str) -> int:
        if stage not in ("ready", "started", "processed", "completed"):
            raise AttributeError(stage)
        more = self._running if stage in ("ready", "started") else 0
        return int(getattr(self._progress, self._name)) + more

    def __setattr__(self, stage: str, value: int) -> None:
        more = self._running if stage in ("ready", "started") else 0
        setattr(self._progress, self._name, value - more)


class _Counts:
    """``total`` and ``current`` of one count."""

    def __init__(self, count: _Count) -> None:
        self.total = self.current = count


class _Optimization:
    """The count of steps, under both of the names it has in Lightning."""

    def __init__(self, steps: _Count) -> None:
        self.optim_step_progress = _Counts(steps)
        self.optim_progress = _Named(optimizer=_Named(step=_Counts(steps)), optimizer_steps=steps)


class _Named:
    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


class EpochLoop:
    """Batches and steps.

    Args:
        trainer: whose they are.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._progress = trainer, trainer.progress
        steps = _Count(self._progress, "global_step")
        self.manual_optimization = self.automatic_optimization = _Optimization(steps)
        at_work = self._progress.first_batch + self._progress.batch_idx >= self._progress.batches
        self.batch_progress = _Counts(_Count(self._progress, "batches", int(at_work)))
        self.max_steps, self.min_steps = trainer.max_steps, getattr(trainer, "min_steps", None)

    batch_idx = property(lambda self: self._progress.batch_idx, doc="The current batch of the epoch, from 0.")
    global_step = property(lambda self: self._progress.global_step, doc="As ``trainer.global_step``.")

    @property
    def total_batch_idx(self) -> int:
        """The current batch over all epochs, from 0."""
        return self.batch_progress.total.ready - 1


class FitLoop:
    """Epochs, and the loop over batches.

    Args:
        trainer: whose they are.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.epoch_loop = EpochLoop(trainer)
        self.epoch_progress = _Counts(_Count(trainer.progress, "epoch"))
        self.min_epochs = getattr(trainer, "min_epochs", None)

    total_batch_idx = property(lambda self: self.epoch_loop.total_batch_idx, doc="As of the loop over batches.")
    batch_idx = property(lambda self: self.epoch_loop.batch_idx, doc="The current batch of the epoch, from 0.")
    current_epoch = property(lambda self: self._trainer.current_epoch, doc="Epochs that were finished.")

    @property
    def max_batches(self) -> int | float:
        """As ``trainer.num_training_batches``."""
        return self._trainer.num_training_batches  # type: ignore[no-any-return]

    @property
    def max_epochs(self) -> int | None:
        """As ``trainer.max_epochs``; may be set."""
        return self._trainer.max_epochs  # type: ignore[no-any-return]

    @max_epochs.setter
    def max_epochs(self, value: int | None) -> None:
        self._trainer.max_epochs = value
