"""Steps of optimizers that look at whole parameters: at matrices, or at all of them as one vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Muon, Optimizer

from xtrain.rules import reevaluates_closure

from .sharding import gathered, part_of, write_back


def looks_at_whole(optimizer: Optimizer) -> bool:
    """Return whether a step on shards would compute something else, or round at other places.

    True for LBFGS, `torch.optim.Muon` and for classes that say ``whole_parameters = True``.
    """
    told = bool(getattr(optimizer, "whole_parameters", False))
    return told or isinstance(optimizer, Muon) or reevaluates_closure(optimizer)


class WholeStep:
    """One step of an optimizer on whole copies of its parameters, on every rank alike.

    State with the shape of a parameter is in shards between steps.

    Args:
        optimizer: the user's.
        sharded: those of its parameters that are in shards.
    """

    def __init__(self, optimizer: Optimizer, sharded: list[Tensor]) -> None:
        self._optimizer = optimizer
        self._copies: dict[Tensor, Tensor] = {p: nn.Parameter(gathered(p)) for p in sharded}
        self._back = {copy: parameter for parameter, copy in self._copies.items()}

    def run(self, step: Callable[[Callable[[], Any] | None], Any], closure: Callable[[], Any] | None) -> Any:
        """Return ``step(closure)``, with copies in the optimizer's groups, but not while `closure` runs."""

        def evaluate() -> Any:
            assert closure is not None
            self._publish()
            self._exchange(self._back)
            try:
                loss = closure()
            finally:
                self._exchange(self._copies)
            self._collect_gradients()
            return loss

        self._collect_gradients()
        self._exchange(self._copies)
        try:
            return step(None if closure is None else evaluate)
        finally:
            self._exchange(self._back)
            self._publish()

    def _exchange(self, table: dict[Tensor, Tensor]) -> None:
        state: dict[Any, Any] = self._optimizer.state
        for group in self._optimizer.param_groups:  # in place: LBFGS keeps the list
            group["params"][:] = [table.get(p, p) for p in group["params"]]
        for old, new in table.items():
            if old in state:
                kept = state.pop(old)
                for name, value in kept.items():
                    kept[name] = _to_shard(value, new) if isinstance(new, DTensor) else _to_whole(value)
                state[new] = kept

    def _collect_gradients(self) -> None:
        for parameter, copy in self._copies.items():
            copy.grad = None if parameter.grad is None else gathered(parameter.grad)

    @torch.no_grad()
    def _publish(self) -> None:
        for parameter, copy in self._copies.items():
            write_back(parameter, copy)


def _to_whole(value: Any) -> Any:
    return gathered(value) if isinstance(value, DTensor) else value


def _to_shard(value: Any, parameter: DTensor) -> Any:
    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.dim() == 0:
        return value
    return part_of(value, parameter)
