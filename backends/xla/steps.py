"""Optimizer steps that trace the same graph every time.

XLA compiles a graph again when a Python number in it becomes 0 or 1, or equal to another one: with
Adam's bias correction that happens thousands of steps into a training. So while an optimizer steps,
and only then, its groups are set to what keeps the graph: step counters on the device
(``capturable``), no ``foreach``, and the learning rate as a tensor. Users, schedulers and
checkpoints always see the settings they made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import ASGD, SGD, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, Rprop

from .adam import OneOpAdam
from .runtime import Runtime

_TENSOR_LR = (Adam, AdamW, Adamax, NAdam, RAdam, ASGD)  # their capturable arithmetic takes a tensor as lr
_CAPTURABLE = (*_TENSOR_LR, Rprop)
# Instead of 0: the graph would change, and 0 * inf in Adam's step size is NaN where no gradient ever was.
_TINY = 1e-30
_SETTINGS: tuple[str, ...] = ("lr", "foreach", "fused", "capturable")

RatesInUse = dict[tuple[int, int], float]


class Step:
    """Steps one optimizer.

    Args:
        optimizer: the raw torch optimizer.
        runtime: knows the device.
        rates_in_use: learning rates in use as numbers, shared by the optimizers of a run.
    """

    def __init__(self, optimizer: Optimizer, runtime: Runtime, rates_in_use: RatesInUse) -> None:
        self._optimizer, self._runtime, self._rates_in_use = optimizer, runtime, rates_in_use
        self._capturable = type(optimizer) in _CAPTURABLE
        self._tensor_lr = type(optimizer) in (*_TENSOR_LR, SGD)
        self._sent: dict[tuple[int, Callable[[int, float], Any]], tuple[float, Any]] = {}
        self._one_op = OneOpAdam(optimizer, runtime, self._number)

    @property
    def counts_on_device(self) -> bool:
        """Whether the step counter in the optimizer's state belongs on the device."""
        return self._capturable

    def __call__(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Step, and return what the optimizer returns: the loss of `closure`, which is called once."""
        loss = None
        if closure is not None and self._tensor_lr:  # the closure may look at the settings: call it before
            loss, closure = closure(), None
        if not kwargs and self._one_op.covers_all():
            self._one_op()
            return loss
        groups = self._optimizer.param_groups
        before = [{name: group[name] for name in _SETTINGS if name in group} for group in groups]
        try:
            for index, group in enumerate(groups):
                self._prepare(index, group)
            given = {} if closure is None else {"closure": closure}
            result = self._optimizer.step(**given, **kwargs)
            return result if loss is None else loss
        finally:
            for group, settings in zip(groups, before, strict=True):
                group.update(settings)

    def _prepare(self, index: int, group: dict[str, Any]) -> None:
        for name in ("foreach", "fused"):
            if name in group:
                group[name] = False
        if self._capturable and not group.get("differentiable"):
            group["capturable"] = True
        lr = group.get("lr")
        if isinstance(lr, torch.Tensor) and lr.device.type == "cpu":
            lr = lr.item()
        if isinstance(lr, float | int):
            group["lr"] = self._constant(index, float(lr), self._on_device if self._tensor_lr else self._apart)

    def _number(self, index: int, lr: float) -> float:
        return float(self._constant(index, lr, self._apart))

    def _constant(self, index: int, lr: float, make: Callable[[int, float], Any]) -> Any:
        known = self._sent.get((index, make))
        if known is None or known[0] != lr:
            self._sent[index, make] = known = (lr, make(index, lr or _TINY))
        return known[1]

    def _on_device(self, index: int, lr: float) -> torch.Tensor:
        (tensor,) = self._runtime.to_device([torch.tensor([lr], dtype=torch.float32)])
        # A learning rate that requires a gradient makes SGD multiply by it; it would read any other one.
        return tensor.requires_grad_() if isinstance(self._optimizer, SGD) else tensor

    def _apart(self, index: int, lr: float) -> float:
        """Return `lr`, moved by an ulp or two of fp32 off 1, what a script writes, and other optimizers' numbers."""
        mine = (id(self), index)
        others = {1.0, *(value for key, value in self._rates_in_use.items() if key != mine)}
        value = torch.tensor(lr, dtype=torch.float32)
        value = torch.nextafter(value, torch.zeros(()))
        while value.item() in others:
            value = torch.nextafter(value, torch.zeros(()))
        self._rates_in_use[mine] = value.item()
        return value.item()
