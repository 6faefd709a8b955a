"""LBFGS whose algebra runs on the CPU.

Its two-loop recursion grows with its history, so on the device nearly every iteration would compile
a new graph. The closure is what costs time, and that stays on the device: one execution, one read
and one write of the parameters for each evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS

from xtrain.tensors import map_tensors

from .runtime import Runtime


class HostLBFGS:
    """Steps one `torch.optim.LBFGS` over device parameters.

    Args:
        optimizer: the raw optimizer; its state lives on the CPU.
        runtime: knows the device.
        end_evaluation: launches the graph of one evaluation.
        average: averages the loss (0-dim) over the replicas.
    """

    def __init__(
        self,
        optimizer: LBFGS,
        runtime: Runtime,
        end_evaluation: Callable[[], None],
        average: Callable[[Tensor], Tensor],
    ) -> None:
        self._optimizer, self._runtime = optimizer, runtime
        self._end_evaluation, self._average = end_evaluation, average

    def __call__(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step, and return the loss of the first evaluation, on the CPU."""
        optimizer: Any = self._optimizer
        group = optimizer.param_groups[0]
        device: list[Tensor] = group["params"]
        host = [
            nn.Parameter(read, requires_grad=p.requires_grad)
            for read, p in zip(self._runtime.to_cpu(device), device, strict=True)
        ]

        def evaluate() -> Tensor:
            self._write(device, host)
            group["params"] = device  # the closure zeroes the gradients of the parameters it uses
            try:
                loss = self._average(closure().detach())  # type: ignore[misc]  # torch's LBFGS insists on one
            finally:
                group["params"] = host
            return self._read_gradients(loss, device, host)

        state = optimizer.state.pop(device[0], {})
        group["params"] = optimizer._params = host
        optimizer._numel_cache = None
        optimizer.state[host[0]] = {k: map_tensors(lambda t: t.cpu(), v) for k, v in state.items()}
        try:
            return optimizer.step(evaluate if closure is not None else None, **kwargs)
        finally:
            optimizer.state[device[0]] = optimizer.state.pop(host[0])
            group["params"] = optimizer._params = device
            self._write(device, host)

    def _write(self, device: Sequence[Tensor], host: Sequence[Tensor]) -> None:
        for p, value in zip(device, self._runtime.to_device([h.detach().clone() for h in host]), strict=True):
            p.data = value

    def _read_gradients(self, loss: Tensor, device: Sequence[Tensor], host: Sequence[Tensor]) -> Tensor:
        self._end_evaluation()
        pairs = [(h, p.grad) for h, p in zip(host, device, strict=True) if p.grad is not None]
        read, *gradients = self._runtime.to_cpu([loss, *(grad for _, grad in pairs)])
        for (parameter, _), gradient in zip(pairs, gradients, strict=True):
            parameter.grad = gradient
        return read
