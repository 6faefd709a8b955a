"""`LearningRateMonitor`: the learning rate of every optimizer, beside the other metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from xtrain.callbacks.base import Callback
from xtrain.errors import ConfigurationError, explain

if TYPE_CHECKING:
    from xtrain.module import LightningModule
    from xtrain.trainer import Trainer


class LearningRateMonitor(Callback):
    """Logs learning rates as ``lr-Adam``, ``lr-Adam-1``, ``lr-generator``, ``lr-Adam/pg1``, ...

    The name is that of the optimizer's schedule (``"name"`` of its settings), else the optimizer's own in a
    dict from ``configure_optimizers``, else its class; ``/pgN`` tells several parameter groups apart.

    Args:
        logging_interval: ``"step"`` (at log points), ``"epoch"`` (once per epoch, as it begins) or None, which
            takes the interval of the schedules: epochs if all of them move by epochs, else steps.
        log_momentum: log ``<name>-momentum``, too (the first beta of Adam).
        log_weight_decay: log ``<name>-weight_decay``, too.

    Raises:
        ConfigurationError: for an unknown interval, and at the start of a training without a logger.

    Example:
        >>> trainer = Trainer(logger=True, callbacks=[LearningRateMonitor("step")])
    """

    def __init__(
        self, logging_interval: str | None = None, log_momentum: bool = False, log_weight_decay: bool = False
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            fix = "LearningRateMonitor(logging_interval='step')"
            raise ConfigurationError(explain("logging_interval 'step', 'epoch' or None", repr(logging_interval), fix))
        self.logging_interval = logging_interval
        self.log_momentum, self.log_weight_decay = log_momentum, log_weight_decay
        self._by_step = False
        self._names: list[str] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Name the optimizers, and find out when their rates change."""
        if not trainer.loggers:
            fix = "Trainer(logger=True, callbacks=[LearningRateMonitor()])"
            raise ConfigurationError(explain("a logger beside LearningRateMonitor", "none", fix))
        intervals = {config.interval for config in trainer.lr_scheduler_configs}
        self._by_step = self.logging_interval != "epoch" if self.logging_interval else intervals != {"epoch"}
        self._names = list(_names(trainer))

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Log, if epochs are asked for."""
        if not self._by_step:
            self.log_dict(self._values(trainer))

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log, if steps are asked for."""
        if self._by_step:
            self.log_dict(self._values(trainer), on_step=True, on_epoch=False)

    def _values(self, trainer: Trainer) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, optimizer in zip(self._names, trainer.life.optimizers, strict=True):
            groups = optimizer.param_groups
            for index, group in enumerate(groups):
                label = f"{name}/pg{index + 1}" if len(groups) > 1 else name
                values[label] = group["lr"]
                if self.log_momentum:
                    values[f"{label}-momentum"] = group["betas"][0] if "betas" in group else group.get("momentum", 0)
                if self.log_weight_decay:
                    values[f"{label}-weight_decay"] = group.get("weight_decay", 0)
        return values


def _names(trainer: Trainer) -> Iterator[str]:
    """Yield one name per optimizer; the second of the same class gets ``-1``, as in Lightning."""
    scheduled = {id(config.scheduler.optimizer): config.name for config in trainer.lr_scheduler_configs}
    seen: Counter[str] = Counter()
    for optimizer in trainer.life.optimizers:
        raw = optimizer.optimizer
        label = scheduled.get(id(raw)) or f"lr-{getattr(optimizer, 'name', None) or type(raw).__name__}"
        yield f"{label}-{seen[label]}" if seen[label] else label
        seen[label] += 1
