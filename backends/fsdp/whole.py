"""Steps of optimizers that compute with all parameters as one vector, as a line search does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .sharding import gathered, write_back


class WholeStep:
    """Lets an optimizer step on whole copies of its parameters, on every rank alike.

    Its state is whole, too, and so repeated on every rank.

    Args:
        optimizer: the user's.
        sharded: those of its parameters that are in shards.
    """

    def __init__(self, optimizer: Optimizer, sharded: list[Tensor]) -> None:
        self._optimizer = optimizer
        self._copies: dict[Tensor, Tensor] = {p: nn.Parameter(gathered(p)) for p in sharded}

    def run(self, step: Callable[[Callable[[], Any]], Any], closure: Callable[[], Any]) -> Any:
        """Return ``step(closure)``, with copies in the optimizer's groups, but not while `closure` runs."""

        def evaluate() -> Any:
            self._publish()
            self._exchange({copy: parameter for parameter, copy in self._copies.items()})
            try:
                loss = closure()
            finally:
                self._exchange(self._copies)
            for parameter, copy in self._copies.items():
                copy.grad = None if parameter.grad is None else gathered(parameter.grad)
            return loss

        for parameter, copy in self._copies.items():
            copy.data.copy_(gathered(parameter))
        self._exchange(self._copies)
        try:
            return step(evaluate)
        finally:
            self._exchange({copy: parameter for parameter, copy in self._copies.items()})
            self._publish()

    def _exchange(self, table: dict[Tensor, Tensor]) -> None:
        for group in self._optimizer.param_groups:  # in place: LBFGS keeps the list
            group["params"][:] = [table.get(p, p) for p in group["params"]]

    @torch.no_grad()
    def _publish(self) -> None:
        for parameter, copy in self._copies.items():
            write_back(parameter, copy)
            copy.grad = None
