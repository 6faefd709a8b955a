"""What backends share that train with a loss scale (``16-mixed``): its creation and its state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from xtrain.contract import Backend, OptimizerHandle
from xtrain.scaler import LossScaler


class ScalingBackend(Backend):
    """A backend that scales its losses under ``16-mixed``.

    Attributes:
        scaler: knows the scale, and whose gradients carry it; None under other precisions.
    """

    scaler: LossScaler | None = None

    def _start_scaler(self) -> None:
        """Make the scaler of a run; a second run goes on with the scale of the first."""
        if self.scaler is not None:
            self.scaler.begin()
        elif self.precision.loss_scaling:
            options = self.scaler_kwargs or {}
            self.scaler = LossScaler(self.device.type, self.scaled_gradients, self.gradient_versions, **options)

    def scaled_gradients(self, optimizer: OptimizerHandle) -> Iterable[Any]:
        """Return objects whose ``grad`` is a gradient of `optimizer`: parameters, where gradients are there."""
        return optimizer.parameters

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scaler is None else {"scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
