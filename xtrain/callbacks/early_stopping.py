"""`EarlyStopping`: end a training when a metric no longer improves."""

from __future__ import annotations

import math
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from xtrain.callbacks.base import Callback
from xtrain.errors import ConfigurationError, explain

if TYPE_CHECKING:
    from xtrain.module import LightningModule
    from xtrain.trainer import Trainer


class EarlyStoppingReason(Enum):
    """Why `EarlyStopping` ended a training; its words are in ``EarlyStopping.stopping_reason_message``."""

    NOT_STOPPED = 0
    STOPPING_THRESHOLD = 1
    DIVERGENCE_THRESHOLD = 2
    PATIENCE_EXHAUSTED = 3
    NON_FINITE_METRIC = 4


class EarlyStopping(Callback):
    """Ends a training when a logged metric stops improving, on all ranks in the same epoch.

    It runs after the module's own hooks, so it sees what the module logs in ``on_train_epoch_end``.

    Args:
        monitor: a name in ``trainer.callback_metrics``.
        min_delta: a change smaller than this is no improvement.
        patience: checks without improvement after which training ends.
        verbose: print every improvement, too.
        mode: ``"min"`` or ``"max"``, what is better.
        strict: raise if `monitor` was not logged, rather than wait for it.
        check_finite: end when the metric is NaN or infinite.
        stopping_threshold: end when the metric is better than this.
        divergence_threshold: end when it is worse than this.
        check_on_train_epoch_end: look at the end of training epochs (True) or of validations (False); None
            takes validations where they and epochs do not come one to one.
        log_rank_zero_only: taken as in Lightning, not needed: rank 0 alone says why.

    Attributes:
        best_score: the best value so far, a float.
        wait_count: checks since then.
        stopped_epoch: the epoch in which training was ended, 0 before.
        stopping_reason: why, an `EarlyStoppingReason`; another rank's is told where this one goes on.
        reason: why, in words; empty before.

    Raises:
        ConfigurationError: for an unknown `mode`.

    Example:
        >>> trainer = Trainer(callbacks=[EarlyStopping("val_loss", patience=5)])
    """

    after_module = True

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = True,
    ) -> None:
        if mode not in ("min", "max"):
            fix = f"EarlyStopping({monitor!r}, mode='min')"
            raise ConfigurationError(explain("mode 'min' or 'max'", repr(mode), fix))
        self.monitor, self.mode, self.patience = monitor, mode, patience
        self.min_delta, self.verbose, self.strict = abs(min_delta), verbose, strict
        self.check_finite = check_finite
        self.stopping_threshold, self.divergence_threshold = stopping_threshold, divergence_threshold
        self.best_score = math.inf if mode == "min" else -math.inf
        self.wait_count = self.stopped_epoch = 0
        self.stopping_reason, self.reason = EarlyStoppingReason.NOT_STOPPED, ""
        self._at_epoch_end = check_on_train_epoch_end
        self._fitting = False

    @property
    def stopping_reason_message(self) -> str | None:
        """The words of `reason`, None before."""
        return self.reason or None

    # ---------------------------------------------------------------- when

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Find out whether training epochs or validations are what it counts."""
        self._fitting = stage == "fit"
        if self._at_epoch_end is None:
            each_epoch = trainer.check_val_every_n_epoch == 1 and trainer.val_check_interval in (None, 1.0)
            self._at_epoch_end = each_epoch

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Check, if epochs are counted."""
        if self._at_epoch_end:
            self._check(trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Check, if validations are counted."""
        if self._fitting and not self._at_epoch_end and not trainer.sanity_checking:
            self._check(trainer)

    # ---------------------------------------------------------------- what

    def _check(self, trainer: Trainer) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            if self.strict:
                fix = f"self.log({self.monitor!r}, value) in validation_step, or EarlyStopping(..., strict=False)"
                raise ConfigurationError(
                    explain(
                        f"the metric {self.monitor!r} of EarlyStopping in trainer.callback_metrics",
                        f"only {sorted(trainer.callback_metrics)}",
                        fix,
                    )
                )
            return
        kind, reason = self._judge(float(value))
        ranks = trainer.backend.collectives
        if ranks.world_size > 1:  # a rank that goes on alone would wait for ever for those that stopped
            most = int(ranks.all_reduce(torch.tensor(float(kind.value), device=trainer.backend.device), "max").item())
            if most and not reason:
                kind, reason = EarlyStoppingReason(most), f"{self.monitor} on another rank"
        if reason:
            trainer.should_stop, self.stopping_reason = True, kind
            self.stopped_epoch, self.reason = trainer.current_epoch, reason
            least = {"min_epochs": trainer.options.min_epochs, "min_steps": trainer.options.min_steps}
            later = ", ".join(f"{name}={value}" for name, value in least.items() if value)
            end = f"ends the training, not before {later}," if later else "ends the training"
            trainer.print(f"EarlyStopping {end} in epoch {trainer.current_epoch}: {reason}.")
        elif self.verbose and self.wait_count == 0:
            trainer.print(f"EarlyStopping: {self.monitor} is best so far, {self.best_score:.5g}.")

    def _judge(self, value: float) -> tuple[EarlyStoppingReason, str]:
        """Return why training should end at this `value`, and the same in words; an empty text if it goes on."""
        shown = f"{self.monitor} = {value:.5g}"
        if self.check_finite and not math.isfinite(value):
            return EarlyStoppingReason.NON_FINITE_METRIC, f"{shown} is not finite"
        if self.stopping_threshold is not None and self._better(value, self.stopping_threshold):
            return EarlyStoppingReason.STOPPING_THRESHOLD, f"{shown} has reached {self.stopping_threshold:.5g}"
        if self.divergence_threshold is not None and self._better(self.divergence_threshold, value):
            return EarlyStoppingReason.DIVERGENCE_THRESHOLD, f"{shown} is worse than {self.divergence_threshold:.5g}"
        if self._better(value, self.best_score, self.min_delta):
            self.best_score, self.wait_count = value, 0
            return EarlyStoppingReason.NOT_STOPPED, ""
        self.wait_count += 1
        if self.wait_count < self.patience:
            return EarlyStoppingReason.NOT_STOPPED, ""
        words = f"{self.monitor} has not improved on {self.best_score:.5g} in {self.wait_count} checks"
        return EarlyStoppingReason.PATIENCE_EXHAUSTED, words

    def _better(self, value: float, than: float, margin: float = 0.0) -> bool:
        return value < than - margin if self.mode == "min" else value > than + margin

    # ---------------------------------------------------------------- checkpoints

    @property
    def state_key(self) -> str:
        """The class, with what tells several of them apart."""
        facts = {"monitor": self.monitor, "mode": self.mode}
        return f"{type(self).__qualname__}{facts}"

    def state_dict(self) -> dict[str, Any]:
        """Return how far its patience goes."""
        return {name: getattr(self, name) for name in ("best_score", "wait_count", "stopped_epoch", "patience")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.best_score, self.wait_count = float(state["best_score"]), state["wait_count"]
        self.stopped_epoch, self.patience = state["stopped_epoch"], state["patience"]
