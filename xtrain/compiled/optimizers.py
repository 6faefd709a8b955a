"""Optimizers whose learning rate and step count are tensors while a step is recorded.

A rate that is a Python number would be part of the recorded operations, and freeze; as a tensor it is an input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_FORCED = {"capturable": True, "foreach": True, "fused": None}


def keep_on_device(optimizers: Sequence[Optimizer]) -> None:
    """Let optimizers on a GPU count their steps there: a count on the host would not go on in a captured graph."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "capturable" in group and not all(p.is_cpu for p in group["params"]):
                group["capturable"] = True
                for parameter in group["params"]:
                    state = optimizer.state.get(parameter, {})
                    if isinstance(state.get("step"), Tensor):
                        state["step"] = state["step"].to(parameter.device)


class Rates:
    """The learning rates of all groups as 0-dim tensors, which replays read.

    Args:
        optimizers: of the run.
        device: where they compute.
    """

    def __init__(self, optimizers: Sequence[Optimizer], device: torch.device) -> None:
        self.groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.tensors: list[Tensor] = []
        for group in self.groups:
            rate = group["lr"]
            own = (
                torch.tensor(float(rate), dtype=torch.float32, device=device) if not isinstance(rate, Tensor) else rate
            )
            self.tensors.append(own)
        self.late = False  # whether a rate changed in a step, before an optimizer used it
        self._shown: list[Any] = [group["lr"] for group in self.groups]

    def refresh(self, stepping: Optimizer | None = None) -> None:
        """Take the rates over that schedulers have changed: all of them, or in a step those of the `stepping` one."""
        for index, group in enumerate(self.groups):
            rate = group["lr"]
            if stepping is not None and not any(group is own for own in stepping.param_groups):
                continue
            if rate is not self._shown[index]:
                self._shown[index] = rate
                self.late = self.late or stepping is not None
                if rate is not self.tensors[index]:
                    self.tensors[index].fill_(rate)

    def of(self, group: dict[str, Any]) -> Tensor:
        """Return the tensor of `group`."""
        return next(tensor for known, tensor in zip(self.groups, self.tensors, strict=True) if known is group)


@contextmanager
def made_of_tensors(optimizers: Sequence[Optimizer], rates: Rates) -> Iterator[None]:
    """Let the steps of `optimizers` inside the context compute with tensors only.

    torch has this mode for its own compiler and for CUDA graphs: ``capturable`` and ``foreach``, and a flag that
    says that something is compiled. It holds for the optimizer's own work, not for the forward of a closure.
    """
    with ExitStack() as stack:
        for optimizer in optimizers:
            steps = _Steps(optimizer, rates)
            stack.callback(steps.end)
            stack.callback(optimizer.register_step_post_hook(steps.after).remove)
            stack.callback(optimizer.register_step_pre_hook(steps.before).remove)
        yield


class _Steps:
    """Switches the groups of one optimizer between its own settings and tensors.

    A step that calls the step of its base class runs the hooks twice: the outer ones count.
    """

    def __init__(self, optimizer: Optimizer, rates: Rates) -> None:
        self._optimizer, self._rates = optimizer, rates
        self._kept: list[dict[str, Any]] = []
        self._depth = 0

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self._depth += 1
        if self._depth > 1:
            return args, kwargs
        closure = next((c for c in (*args[1:], kwargs.get("closure")) if callable(c)), None)
        self.begin()
        return (args, kwargs) if closure is None else ((args[0], self._outside(closure)), {})

    def begin(self) -> None:
        self._rates.refresh(self._optimizer)
        self._kept = [dict(group) for group in self._optimizer.param_groups]
        for group in self._optimizer.param_groups:
            group["lr"] = self._rates.of(group)
            group.update({key: value for key, value in _FORCED.items() if key in group})
        torch.compiler._is_compiling_flag = True

    def after(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.end()

    def end(self) -> None:
        torch.compiler._is_compiling_flag = False
        for group, kept in zip(self._optimizer.param_groups, self._kept, strict=False):
            given = {"lr": self._rates.of(group), **_FORCED}  # what the step itself has changed since stays
            group.update({key: kept[key] for key, value in given.items() if key in kept and group[key] is value})
        self._kept = []

    def _outside(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            self.end()
            try:
                return closure()
            finally:
                self.begin()

        return evaluate
