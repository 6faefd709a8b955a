"""Automatic optimization: one optimizer, one loss, over the same verbs as a manual step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from xtrain.configure import LRSchedulerConfig
from xtrain.errors import ConfigurationError, explain
from xtrain.module import LightningModule
from xtrain.run.state import Run


class AutomaticStep:
    """Runs ``training_step`` for its loss, and the life of the gradient after it.

    Args:
        run: gives accumulation, clipping, schedulers and module.
        training_step: the user's, taking ``(batch, batch_idx)``.
    """

    def __init__(self, run: Run, training_step: Any) -> None:
        self._run, self._training_step = run, training_step
        self._trainer, self._module, self._life = run.trainer, run.module, run.life
        self._window = 0  # micro-batches accumulated since the last step
        if run.trainer.gradient_clip_val is not None or _overrides_clipping(run.module):
            # Clipping belongs between finalize and step, where the hooks before a step run.
            self._life.hooks["on_before_optimizer_step"].append(self._clip)

    def __call__(self, batch: Any, batch_idx: int) -> Any:
        """Train on one batch; returns what the user's step returned."""
        trainer = self._trainer
        if not self._life.optimizers:
            return self._training_step(batch, batch_idx)
        outputs: Any = None

        def closure() -> Any:
            nonlocal outputs
            outputs = self._training_step(batch, batch_idx)
            loss = _loss_of(outputs)
            if loss is None:
                raise _SkipBatchError
            if self._window == 0:
                self._module.optimizer_zero_grad(trainer.current_epoch, batch_idx, optimizer)
            loss_of_batch = loss / trainer.accumulate_grad_batches
            with self._life.backward(loss_of_batch):
                self._life.backend.backward(loss_of_batch)
            return loss

        optimizer = self._life.optimizers[0]
        try:
            if self._window + 1 < trainer.accumulate_grad_batches and not trainer.is_last_batch:
                closure()
                self._window += 1
                return outputs
            steps = optimizer.step_count
            self._module.optimizer_step(trainer.current_epoch, batch_idx, optimizer, closure)
        except _SkipBatchError:
            return None
        self._window = 0
        if optimizer.step_count > steps:  # a step skipped by the loss scaler moves no schedule
            self.step_schedulers("step", optimizer.step_count)
        return outputs

    def _clip(self, optimizer: Any) -> None:
        trainer = self._trainer
        self._module.configure_gradient_clipping(
            optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm or "norm"
        )

    def step_schedulers(self, interval: str, count: int) -> None:
        """Step the schedulers of `interval` whose frequency divides `count`."""
        for config in self._run.schedulers:
            if config.interval == interval and count % config.frequency == 0:
                metric = self._monitored(config)
                if metric is not None or not config.reduce_on_plateau:
                    self._module.lr_scheduler_step(config.scheduler, metric)

    def _monitored(self, config: LRSchedulerConfig) -> Any:
        if not config.reduce_on_plateau:
            return None
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
