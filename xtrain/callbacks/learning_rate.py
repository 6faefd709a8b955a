"""`LearningRateMonitor`: the learning rate of every optimizer, beside the other metrics."""

from __future__ import annotations

import warnings
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
    dict from ``configure_optimizers``, else its class; ``/pgN`` tells several parameter groups apart, or the ``"name"``
    that a group has.

    Args:
        logging_interval: ``"step"`` (at log points), ``"epoch"`` (once per epoch, as it begins) or None, which
            takes the interval of the schedules: epochs if all of them move by epochs, else steps.
        log_momentum: log ``<name>-momentum``, too (the first beta of Adam).
        log_weight_decay: log ``<name>-weight_decay``, too.

    Attributes:
        lrs: the rates that went to the loggers, a list for each name.
        last_momentum_values: the newest momentum by name.
        last_weight_decay_values: the newest weight decay by name.

    Raises:
        ConfigurationError: for an unknown interval, and at the start of a training without a logger or with two
            groups of one name.

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
        self.lrs: dict[str, list[float]] = {}
        self.last_momentum_values: dict[str, float] = {}
        self.last_weight_decay_values: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Name the optimizers, and find out when their rates change."""
        if not trainer.loggers:
            fix = "Trainer(logger=True, callbacks=[LearningRateMonitor()])"
            raise ConfigurationError(explain("a logger beside LearningRateMonitor", "none", fix))
        intervals = {config.interval for config in trainer.lr_scheduler_configs}
        self._by_step = self.logging_interval != "epoch" if self.logging_interval else intervals != {"epoch"}
        self._names, self.lrs = list(_names(trainer)), {}
        self._values(trainer, False)  # the names, for who looks before the first row
        _check_groups(trainer)
        moving = [o for o in trainer.life.optimizers if {"betas", "momentum"} & o.optimizer.defaults.keys()]
        if self.log_momentum and not moving:
            fix = "LearningRateMonitor(log_momentum=False)"
            warnings.warn(explain("an optimizer with momentum", "none: 0 is logged", fix), RuntimeWarning, stacklevel=2)

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Log, if epochs are asked for."""
        if not self._by_step:
            self.log_dict(self._values(trainer, True))

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log, if steps are asked for."""
        if self._by_step:
            every = trainer.log_every_n_steps
            kept = every > 0 and ((trainer.progress.logged_steps + 1) % every == 0 or trainer.is_last_batch)
            self.log_dict(self._values(trainer, kept), on_step=True, on_epoch=False)

    def _values(self, trainer: Trainer, kept: bool) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, optimizer in zip(self._names, trainer.life.optimizers, strict=True):
            groups = optimizer.param_groups
            for index, group in enumerate(groups):
                label = f"{name}/{_name_of(group, index)}" if len(groups) > 1 or "name" in group else name
                values[label] = group["lr"]
                rates = self.lrs.setdefault(label, [])
                if kept:
                    rates.append(float(group["lr"]))
                if self.log_momentum:
                    momentum = group["betas"][0] if "betas" in group else group.get("momentum", 0)
                    values[f"{label}-momentum"] = self.last_momentum_values[f"{label}-momentum"] = momentum
                if self.log_weight_decay:
                    decay = group.get("weight_decay", 0)
                    values[f"{label}-weight_decay"] = self.last_weight_decay_values[f"{label}-weight_decay"] = decay
        return values


def _name_of(group: dict[str, Any], index: int) -> str:
    return str(group.get("name", f"pg{index + 1}"))


def _check_groups(trainer: Trainer) -> None:
    """Check that no two groups of an optimizer would be logged under one name."""
    for optimizer in trainer.life.optimizers:
        names = Counter(_name_of(group, index) for index, group in enumerate(optimizer.param_groups))
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            fix = "[{'params': self.encoder.parameters(), 'name': 'encoder'}, ...], each name once"
            raise ConfigurationError(explain("a name for each parameter group", f"{', '.join(twice)} twice", fix))


def _names(trainer: Trainer) -> Iterator[str]:
    """Yield one name per optimizer; the second of the same class gets ``-1``, as in Lightning."""
    scheduled = {id(config.scheduler.optimizer): config.name for config in trainer.lr_scheduler_configs}
    seen: Counter[str] = Counter()
    for optimizer in trainer.life.optimizers:
        raw = optimizer.optimizer
        label = scheduled.get(id(raw)) or f"lr-{getattr(optimizer, 'name', None) or type(raw).__name__}"
        yield f"{label}-{seen[label]}" if seen[label] else label
        seen[label] += 1
