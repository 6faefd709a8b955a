"""The verbs of a backend whose tensors compute when asked: what CPU and CUDA have in common.

Several processes are replicas: each computes the gradients of its share of the batch, which are averaged
when they are first needed. No wrapper stands around the module, so the training step may call whatever
it likes, as often as it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xtrain.checks import check_switch, check_timeout
from xtrain.contract import OptimizerHandle
from xtrain.rules import reevaluates_closure
from xtrain.scaler import LossScaler
from xtrain.tensors import move_module

from .averaging import agree, average, state_of
from .gradients import backward_of, clip_norm, clip_value, drop_gradients
from .process_group import join_processes, random_stream
from .replicas import CommonBuffers, check_module, check_optimizers, check_replicas
from .scaling import ScalingBackend
from .stepping import step_of


class EagerBackend(ScalingBackend):
    """Backward, clip and step of plain PyTorch, with the loss scaler for several optimizers.

    Args:
        broadcast_start: every rank starts with the parameters of rank 0; False refuses to start with
            different ones.
        timeout: seconds that a process waits for the others before it gives up.
    """

    _optimizers: Sequence[OptimizerHandle] = ()
    _replicated: bool = False  # whether there are other processes
    _buffers: CommonBuffers | None = None  # of a training on several processes

    def __init__(self, broadcast_start: bool = True, timeout: float = 600.0) -> None:
        self.broadcast_start = check_switch("broadcast_start", broadcast_start, type(self).__name__)
        self.timeout = check_timeout(timeout, type(self).__name__)

    def join(self, kind: str) -> None:
        """Join the processes, on `device`, by the library `kind`: ``"gloo"``, ``"nccl"``, or the device's own."""
        self.collectives = join_processes(kind, self.device, devices=self.devices, timeout=self.timeout)
        self._replicated = self.collectives.world_size > 1

    def setup_module(self, module: nn.Module) -> None:
        if self._replicated:
            check_module(module, self.collectives, self.broadcast_start)
        move_module(module, self.device, self.precision.parameter_dtype)

    def setup_optimizers(self, module: nn.Module, optimizers: Sequence[OptimizerHandle]) -> None:
        self._optimizers = optimizers
        if self._replicated:
            check_optimizers(module, optimizers, self.collectives)
            self._buffers = CommonBuffers(module, self.collectives)
        self._start_scaler()

    def random_stream(self) -> AbstractContextManager[None]:
        return random_stream(self.collectives, self.device)

    def zero_grad(self, optimizer: OptimizerHandle, set_to_none: bool = True) -> None:
        if not (set_to_none and drop_gradients(optimizer.optimizer)):
            optimizer.optimizer.zero_grad(set_to_none)
        if self.scaler is not None:
            self.scaler.forget(optimizer)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.precision.name == "32-true":  # the common case costs nothing
            backward_of(loss, *args, **kwargs)()
            return
        restored = [] if self.scaler is None else self.scaler.restore(self._optimizers)
        with self.precision.backward_context(self.device.type):
            (loss if self.scaler is None else self.scaler.scale(loss)).backward(*args, **kwargs)
        if self.scaler is not None:
            self.scaler.finish_restore(restored)

    def finalize_gradients(self, optimizer: OptimizerHandle) -> None:
        self.average_gradients(optimizer)
        if self.scaler is not None:
            self.unscale_gradients(self.scaler, optimizer)

    def average_gradients(self, optimizer: OptimizerHandle) -> None:
        """Average the gradients of `optimizer` over the processes; an overflow on one is one on all after this."""
        if self._replicated:
            parameters = optimizer.parameters
            states = self._agree(optimizer, [state_of(p) for p in parameters])
            average(parameters, states, self.collectives.world_size)

    def _agree(self, optimizer: OptimizerHandle, facts: list[int]) -> list[int]:
        """Meet the other ranks at `optimizer`; return the largest of each of `facts`."""
        call, buffers = f"average the gradients of {optimizer!r} ({len(facts)} parameters)", self._buffers
        changed, *agreed = agree([buffers is not None and buffers.changed(), *facts], call, self.collectives)
        if buffers is not None:
            buffers.stale |= bool(changed)
        return agreed

    def unscale_gradients(self, scaler: LossScaler, optimizer: OptimizerHandle) -> None:
        """Take the loss scale off averaged gradients, and note whether they are finite."""
        scaler.unscale(optimizer)

    def clip_gradients(self, optimizer: OptimizerHandle, value: float, algorithm: Literal["norm", "value"]) -> Tensor:
        return (clip_norm if algorithm == "norm" else clip_value)(optimizer.parameters, value)

    def step(
        self, optimizer: OptimizerHandle, closure: Callable[[], Any] | None = None, **kwargs: Any
    ) -> tuple[Any, bool]:
        if self.scaler is not None and not self.scaler.may_step(optimizer):
            return None, False
        if closure is not None and self._replicated and reevaluates_closure(optimizer.optimizer):
            closure = self._averaged(closure)
        if self.precision.name == "32-true":  # as in backward
            return step_of(optimizer.optimizer)(closure, **kwargs), True
        with self.precision.suspended(self.device.type):
            return step_of(optimizer.optimizer)(closure, **kwargs), True

    def _averaged(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return `closure` with the mean of its loss: a line search must decide the same on every rank."""

        def evaluate() -> Tensor:
            loss = closure()
            local = loss if isinstance(loss, Tensor) else torch.tensor(float(loss), device=self.device)
            return self.collectives.all_reduce(local)

        return evaluate

    def step_boundary(self) -> None:
        if self.scaler is not None:
            self.scaler.update(self._optimizers)
        if self._buffers is not None:  # not earlier: a backward of this step may need what the forward left
            self._buffers.refresh()

    def meet(self, call: str) -> None:
        changed = self._buffers is not None and self._buffers.changed()
        heard = self.collectives.meet(call, bytes([changed]))
        if self._buffers is not None:
            self._buffers.stale |= any(map(any, heard))
            self._buffers.refresh()

    def check_replicas(self, module: nn.Module) -> None:
        if self._replicated:
            check_replicas(module, self.collectives)

    def unseen_gradient(self) -> str | None:
        lost = {"the average over processes": self._replicated, "the loss scale": self.scaler is not None}
        return " and ".join(name for name, missed in lost.items() if missed) or None
