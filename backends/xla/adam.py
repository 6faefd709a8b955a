"""Adam and AdamW as one operation per parameter.

torch's own arithmetic is traced as more than twenty operations per parameter, and tracing is what a
small step costs. torch_xla has one operation for all of them; here it works on the state of the user's
optimizer, which holds afterwards what torch would have left there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from .runtime import Runtime

Rate = Callable[[int, float], float]


class OneOpAdam:
    """Steps one `torch.optim.Adam` or `torch.optim.AdamW`.

    Args:
        optimizer: the raw optimizer; its hooks run as in its own ``step``.
        runtime: has the operation.
        rate: gives the number to be traced for a group's index and learning rate.
    """

    def __init__(self, optimizer: Optimizer, runtime: Runtime, rate: Rate) -> None:
        self._optimizer, self._runtime, self._rate = optimizer, runtime, rate
        self._step = Optimizer.profile_hook_step(self._update)

    def covers_all(self) -> bool:
        """Return whether the operation can do what the groups ask for; torch's own step can do the rest."""
        if type(self._optimizer) not in (Adam, AdamW):
            return False
        return all(_covered(group) for group in self._optimizer.param_groups)

    def __call__(self) -> None:
        """Step."""
        self._step(self._optimizer)
        self._optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers ask whether a step came first

    def _update(self, optimizer: Optimizer) -> None:
        with torch.no_grad():
            for index, group in enumerate(optimizer.param_groups):
                rate = self._rate(index, float(group["lr"]))
                trained = [p for p in group["params"] if p.grad is not None]
                for parameter in trained:
                    self._runtime.adam(parameter, _state_of(optimizer, parameter, group), group, rate)
                # Autograd must notice a backward through values that are no longer there.
                torch.autograd.graph.increment_version(trained)


def _covered(group: dict[str, Any]) -> bool:
    lr = group["lr"]
    constant = (not isinstance(lr, Tensor) or lr.device.type == "cpu") and not isinstance(group["betas"][0], Tensor)
    return constant and not group["differentiable"] and all(p.dtype is torch.float32 for p in group["params"])


def _state_of(optimizer: Optimizer, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        if group["amsgrad"]:
            state["max_exp_avg_sq"] = torch.zeros_like(parameter)
    return state
