"""When the layers of a sharded module are gathered and freed, around forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from xtrain.errors import ProtocolError, explain

from .groups import LayerGroup, reached


class Passes:
    """The passes through one module.

    Between backwards nothing stays gathered, so toggles and steps are seen; but what a gradient with
    ``create_graph=True`` went through stays, since the backward that differentiates it asks for it again.

    Args:
        groups: of the module.
        reduced_in_backward: whether FSDP2 reduces in every backward, which then cannot be differentiated.

    Attributes:
        groups: the same.
    """

    def __init__(self, groups: Sequence[LayerGroup], reduced_in_backward: bool) -> None:
        self.groups, self._reduced = groups, reduced_in_backward
        self._held: list[LayerGroup] = []
        for group in groups:
            if reduced_in_backward:
                group.refuse_graphs()
            else:
                group.keep_local(free_in_backward=False)
                group.before_forward(self._hold)

    def _hold(self, group: LayerGroup) -> None:
        group.follow_toggles()
        group.stay_gathered(True)
        self._held.append(group)

    def meet(self, loss: Tensor, agree: Callable[[list[int]], list[int]]) -> None:
        """Let all ranks gather what the backward of only some of them will ask for.

        Args:
            loss: of the backward that comes.
            agree: returns the largest over the ranks of each of some facts.

        Raises:
            ProtocolError: where gradients are reduced in the backward, which all ranks have to run alike.
        """
        owners = [*self.groups, *(group for group in self.groups for _ in group.parameters)]
        agreed = agree([int(fact) for found in reached(loss, self.groups) for fact in (found, not found)])
        apart = dict.fromkeys(group for i, group in enumerate(owners) if agreed[2 * i] and agreed[2 * i + 1])
        if apart and self._reduced:
            raise ProtocolError(
                explain(
                    "a loss that comes through the same layers on every rank, where each backward reduces gradients",
                    f"one that reaches {', '.join(group.name for group in apart)} on some ranks only",
                    "FSDP(reduce='finalize')",
                )
            )
        for group in apart:
            group.gather()

    @contextmanager
    def backward(self, create_graph: bool, retain_graph: bool) -> Iterator[None]:
        """Return the context of one backward."""
        groups = [] if self._reduced else self.groups
        for group in groups:
            group.keep_local(free_in_backward=not (create_graph or group.gathered))
        try:
            yield
        finally:
            for group in groups:  # a gradient of a gradient, taken between backwards, must find it gathered
                group.keep_local(free_in_backward=False)
        if create_graph:
            return
        if not retain_graph:
            self.let_go()
        for group in groups:
            if group not in self._held:
                group.release()

    def let_go(self) -> None:
        """Forget what was held for a gradient of a gradient; it is freed after its next pass."""
        for group in self._held:
            group.stay_gathered(False)
        self._held = []

    def release(self) -> None:
        """Free all."""
        self.let_go()
        for group in self.groups:
            group.release()
