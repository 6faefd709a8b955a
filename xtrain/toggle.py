"""Toggling: only the parameters of one optimizer require gradients while its loss is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from torch import Tensor

from xtrain.contract import OptimizerHandle
from xtrain.errors import ProtocolError, explain

Handle = TypeVar("Handle", bound=OptimizerHandle)


class ToggleStack(Generic[Handle]):
    """The toggles in effect, innermost last; the innermost decides.

    ``requires_grad`` of every parameter is noted when the first toggle begins and is exactly
    restored when the last one ends, in whatever order they end.

    Args:
        optimizers: all optimizers of the run.

    Attributes:
        active: the toggled optimizers; the parameters of the last one alone require gradients now.
    """

    def __init__(self, optimizers: Sequence[Handle]) -> None:
        self._optimizers = optimizers
        self._parameters: list[Tensor] = []
        self._before: list[bool] = []
        self.active: list[Handle] = []

    def push(self, optimizer: Handle) -> None:
        """Let only the parameters of `optimizer` require gradients."""
        if not self.active:
            self._parameters = list(dict.fromkeys(p for o in self._optimizers for p in o.parameters))
            self._before = [p.requires_grad for p in self._parameters]
        self.active.append(optimizer)
        self._apply()

    def pop(self, optimizer: Handle) -> None:
        """End the latest toggle of `optimizer`.

        Raises:
            ProtocolError: if `optimizer` is not toggled.
        """
        for position in reversed(range(len(self.active))):
            if self.active[position] is optimizer:
                del self.active[position]
                self._apply()
                return
        raise ProtocolError(
            explain(
                "untoggle_optimizer() for an optimizer that is toggled",
                f"{optimizer!r:.60}, which is not",
                "self.toggle_optimizer(opt); ...; self.untoggle_optimizer(opt)",
            )
        )

    def clear(self) -> None:
        """End all toggles, as after an exception."""
        if self.active:
            self.active.clear()
            self._apply()

    def _apply(self) -> None:
        chosen: set[Tensor] | None = None
        if self.active:
            chosen = set(self.active[-1].parameters)
        for parameter, before in zip(self._parameters, self._before, strict=True):
            parameter.requires_grad_(before and (chosen is None or parameter in chosen))
