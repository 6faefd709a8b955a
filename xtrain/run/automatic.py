"""Automatic optimization: one loss, over the same verbs as a manual step; several optimizers share its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from xtrain.configure import LRSchedulerConfig
from xtrain.errors import ConfigurationError, ProtocolError, explain
from xtrain.module import LightningModule
from xtrain.optimizer import LightningOptimizer
from xtrain.run.state import Run

_NOT_RUN: Any = object()
_NO_LOSS = explain("a loss from training_step", "None: nothing was trained on that batch", "return loss")
_CLOSURE = "def optimizer_step(self, epoch, batch_idx, optimizer, closure): optimizer.step(closure=closure)"


class AutomaticStep:
    """Runs ``training_step`` for its loss, and the life of the gradient after it.

    Args:
        run: gives accumulation, clipping, schedulers and module.
        training_step: the user's, taking ``(batch, batch_idx)``.
    """

    def __init__(self, run: Run, training_step: Any) -> None:
        self._run, self._training_step = run, training_step
        self._trainer, self._module, self._life = run.trainer, run.module, run.life
        self.train_on: Callable[[Any, int], Any] = self._train_on  # without the schedules; may be compiled
        if run.trainer.gradient_clip_val is not None or _overrides_clipping(run.module):
            # Clipping belongs between finalize and step, where the hooks before a step run.
            together = len(run.life.optimizers) > 1 and not _overrides_clipping(run.module)
            self._life.hooks["on_before_optimizer_step"].append(self._clip_together if together else self._clip)

    def __call__(self, batch: Any, batch_idx: int) -> Any:
        """Train on one batch; returns what the user's step returned."""
        if not self._life.optimizers:
            return self._training_step(batch, batch_idx)
        steps = self._optimizer.step_count
        try:
            outputs = self.train_on(batch, batch_idx)
        except _SkipBatchError:
            outputs = None
        if self._optimizer.step_count > steps:  # a step skipped by the loss scaler moves no schedule
            self._step_schedulers("step", self._optimizer.step_count, (False, True))
        if self._run.at_end_of_epoch:  # before validation, but those that watch a metric after it
            self._step_schedulers("epoch", self._trainer.current_epoch + 1, (False,))
        return outputs

    def _train_on(self, batch: Any, batch_idx: int) -> Any:
        trainer, optimizer = self._trainer, self._optimizer
        outputs: Any = _NOT_RUN

        def closure() -> Any:
            nonlocal outputs
            outputs = self._training_step(batch, batch_idx)
            loss = _loss_of(outputs)
            if loss is None:
                self._life.warn_once(_NO_LOSS)
                raise _SkipBatchError
            for each in self._life.optimizers if self._run.window == 0 else ():
                self._module.optimizer_zero_grad(trainer.current_epoch, batch_idx, each)
            loss_of_batch = loss / trainer.accumulate_grad_batches
            with self._life.backward(loss_of_batch):
                (self._life.override or self._life.backend.backward)(loss_of_batch)
            return loss

        if self._run.window + 1 < trainer.accumulate_grad_batches and not trainer.is_last_batch:
            closure()
            self._run.window += 1
        else:
            self._module.optimizer_step(trainer.current_epoch, batch_idx, optimizer, closure)
            for other in self._life.optimizers[1:]:  # on the gradients of the same backward
                self._module.optimizer_step(trainer.current_epoch, batch_idx, other, lambda: _loss_of(outputs))
            self._run.window = 0
        if outputs is _NOT_RUN:
            raise ProtocolError(explain("optimizer_step to run its closure, which trains", "no call of it", _CLOSURE))
        return outputs

    @property
    def _optimizer(self) -> LightningOptimizer:
        return self._life.optimizers[0]  # type: ignore[no-any-return]

    def _clip(self, optimizer: Any) -> None:
        trainer = self._trainer
        self._module.configure_gradient_clipping(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)

    def _clip_together(self, optimizer: Any) -> None:
        """Clip the gradients of all optimizers as one vector, before the first of them steps."""
        first, *others = self._life.optimizers
        if optimizer is not first.optimizer:
            return
        value, algorithm = self._trainer.gradient_clip_val, self._trainer.gradient_clip_algorithm or "norm"
        assert value is not None
        limits = dict.fromkeys((first, *others), value)
        if algorithm == "norm":
            norms = [each.clip_gradients(math.inf, "norm") for each in limits]
            sizes = dict(zip(limits, self._life.backend.read_scalars(norms), strict=True))
            total = math.sqrt(sum(size**2 for size in sizes.values()))
            # Each part of a vector that is too long becomes shorter by the same factor.
            limits = {each: value * size / total for each, size in sizes.items() if total > value and size > 0}
        for each, limit in limits.items():
            each.clip_gradients(limit, algorithm)

    def end_epoch(self, skipped: bool) -> None:
        """Step the schedules that follow the hooks of an epoch's end, unless the epoch was left in its middle.

        Args:
            skipped: a hook skipped the rest of the epoch, which ended it by that.
        """
        if skipped or self._run.at_end_of_epoch:
            self._step_schedulers("epoch", self._trainer.current_epoch + 1, (False, True) if skipped else (True,))

    def _step_schedulers(self, interval: str, count: int, watching: tuple[bool, ...]) -> None:
        """Step the schedulers of `interval` whose frequency divides `count`: those that watch a metric, or not."""
        for config in self._run.schedulers:
            if config.interval == interval and count % config.frequency == 0 and config.reduce_on_plateau in watching:
                metric = self._monitored(config)
                if metric is not None or not config.reduce_on_plateau:
                    self._module.lr_scheduler_step(config.scheduler, metric)

    def _monitored(self, config: LRSchedulerConfig) -> Any:
        if not config.reduce_on_plateau:
            return None
        if config.interval == "step":  # the ranks' mean of this very step
            self._run.metrics.reduce_now(str(config.monitor))
        metrics = self._trainer.callback_metrics
        if config.monitor in metrics:
            return metrics[config.monitor]
        text = explain(
            f"the monitored metric {config.monitor!r} in trainer.callback_metrics",
            f"only {sorted(metrics)}",
            "{'scheduler': plateau, 'monitor': 'val_loss'} and self.log('val_loss', loss) in validation_step",
        )
        if config.strict:
            raise ConfigurationError(text)
        self._life.warn_once(text)
        return None


class _SkipBatchError(Exception):
    """The training step returned None: this batch trains nothing."""


def _loss_of(outputs: Any) -> Tensor | None:
    if outputs is None or isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping) and isinstance(outputs.get("loss"), Tensor):
        return outputs["loss"]  # type: ignore[no-any-return]
    raise ConfigurationError(
        explain(
            "training_step to return the loss, a dict with 'loss', or None to skip the batch",
            f"{type(outputs).__name__}",
            "return loss",
        )
    )


def _overrides_clipping(module: LightningModule) -> bool:
    return type(module).configure_gradient_clipping is not LightningModule.configure_gradient_clipping
