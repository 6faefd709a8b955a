"""The verbs of a backend whose tensors compute when asked: what CPU and CUDA have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from xtrain.contract import Backend
from xtrain.optimizer import LightningOptimizer, Phase
from xtrain.precision import LossScaler, rescale_gradients


class EagerBackend(Backend):
    """Backward, clip and step of plain PyTorch, with the loss scaler for several optimizers."""

    scaler: LossScaler | None = None
    _optimizers: Sequence[LightningOptimizer] = ()
    _unscaled: frozenset[int] = frozenset()  # ids of optimizers whose gradients have lost the loss scale

    def setup_module(self, module: nn.Module) -> None:
        module.to(self.device, self.precision.parameter_dtype)

    def setup_optimizers(self, module: nn.Module, optimizers: Sequence[LightningOptimizer]) -> None:
        self._optimizers = optimizers
        self._unscaled = frozenset()
        if self.precision.loss_scaling and self.scaler is None:
            self.scaler = LossScaler(self.device.type, **(self.scaler_kwargs or {}))

    def zero_grad(self, optimizer: LightningOptimizer, set_to_none: bool = True) -> None:
        optimizer.optimizer.zero_grad(set_to_none)
        if self.scaler is not None:
            self.scaler.forget(optimizer.optimizer)
            self._unscaled -= {id(optimizer)}

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.precision.name == "32-true":  # nothing to suspend: the common case costs nothing
            loss.backward(*args, **kwargs)
            return
        if self.scaler is not None:
            self._restore_scale(self.scaler)
            loss = self.scaler.scale(loss)
        with self.precision.suspended(self.device.type):
            loss.backward(*args, **kwargs)

    def _restore_scale(self, scaler: LossScaler) -> None:
        """Give what is left from an earlier step its scale back, before scaled gradients are added."""
        for optimizer in self._optimizers:
            if id(optimizer) in self._unscaled and optimizer.phase is Phase.STEPPED:
                rescale_gradients(optimizer.parameters, scaler.current_scale)
                self._unscaled -= {id(optimizer)}

    def finalize_gradients(self, optimizer: LightningOptimizer) -> None:
        if self.scaler is not None:
            self.scaler.unscale_(optimizer.optimizer)
            self._unscaled |= {id(optimizer)}

    def clip_gradients(
        self, optimizer: LightningOptimizer, value: float, algorithm: Literal["norm", "value"]
    ) -> Tensor:
        if algorithm == "norm":
            return nn.utils.clip_grad_norm_(optimizer.parameters, value)
        norm = nn.utils.get_total_norm([p.grad for p in optimizer.parameters if p.grad is not None])
        nn.utils.clip_grad_value_(list(optimizer.parameters), value)
        return norm

    def step(self, optimizer: LightningOptimizer, closure: Callable[[], Any] | None = None) -> tuple[Any, bool]:
        if self.scaler is not None and not self.scaler.may_step(optimizer.optimizer):
            return None, False
        with self.precision.suspended(self.device.type):
            return optimizer.optimizer.step(closure), True

    def step_boundary(self) -> None:
        if self.scaler is None:
            return
        ratio = self.scaler.update_once()
        if ratio != 1.0:
            for optimizer in self._optimizers:
                if id(optimizer) not in self._unscaled:
                    rescale_gradients(optimizer.parameters, ratio)

    def unseen_gradient(self) -> str | None:
        return None if self.scaler is None else "the loss scale"

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scaler is None else {"scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
