"""What would miss a scale, an average or a shard is noticed: raw steps, direct backwards, edits, strange methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import ref

from torch import Tensor
from torch.optim import Optimizer

from xtrain.contract import Backend, OptimizerHandle, Phase
from xtrain.errors import OWN_METHOD, RAW_STEP, UNSEEN, ProtocolError

_TORCHS = frozenset(dir(Optimizer))


class Seen:
    """The gradients of one optimizer as a backward left them.

    Args:
        backend: knows where they are.
        optimizer: whose they are.
    """

    def __init__(self, backend: Backend, optimizer: OptimizerHandle) -> None:
        self._backend = backend
        self._versions = backend.gradient_versions(optimizer)
        # A new gradient may get the address, and so the id, of one that is gone.
        self._gradients = [None if p.grad is None else ref(p.grad) for p in backend.leaves_of(optimizer)]

    def changed(self, optimizer: OptimizerHandle) -> bool:
        """Return whether one of them is another one now, or was edited; to drop one (None) loses nothing."""
        pairs = zip(self._backend.leaves_of(optimizer), self._gradients, strict=False)
        if any(p.grad is not None and (known is None or known() is not p.grad) for p, known in pairs):
            return True
        return _differ(self._versions, self._backend.gradient_versions(optimizer))


def _differ(before: Any, now: Any) -> bool:
    if isinstance(now, list) and isinstance(before, list):
        return any(map(_differ, before, now))
    return now is not None and now != before


def guard(
    optimizer: OptimizerHandle, leaves: Iterable[Tensor], lost: str, allowed: Callable[[str], bool]
) -> Iterator[Any]:
    """Make a raw ``step`` and a direct ``loss.backward()`` raise.

    Args:
        optimizer: whose they would be.
        leaves: into which autograd adds its gradients.
        lost: what they would miss.
        allowed: returns whether a ``"step"`` or a ``"backward"`` that happens now is xtrain's.

    Yields:
        Handles; call ``remove()`` on each when the run ends.
    """

    def refuse_step(*_: Any) -> None:
        if not allowed("step"):
            raise ProtocolError(RAW_STEP.format(optimizer=optimizer, lost=lost))

    def refuse_backward(_: Tensor) -> None:
        if not allowed("backward"):
            raise ProtocolError(UNSEEN.format(optimizer=optimizer, lost=lost))

    yield optimizer.optimizer.register_step_pre_hook(refuse_step)
    # One parameter stands for all: a hook on each would cost a Python call per gradient.
    first = next((p for p in leaves if p.requires_grad and p.is_leaf), None)
    if first is not None:
        yield first.register_post_accumulate_grad_hook(refuse_backward)


def is_own_method(name: str, found: Any) -> bool:
    """Return whether an optimizer's attribute is a method that `torch.optim.Optimizer` does not have."""
    return name not in _TORCHS and inspect.ismethod(found)


def check_own_method(optimizer: OptimizerHandle, name: str, backend: Backend, lost: str | None) -> None:
    """Check that a method that only the raw optimizer has, such as a half-step of SAM, finds true gradients.

    Raises:
        ProtocolError: if there are gradients that still miss `lost`, or may have overflowed.
    """
    scaled = backend.precision.loss_scaling
    if lost is None or not (optimizer.phase is Phase.ACCUMULATED or (scaled and optimizer.phase is Phase.FINALIZED)):
        return
    whole = backend.capabilities.editable_gradients and not scaled
    fix = f"opt.finalize(); opt.{name}(...)" if whole else "one process without a loss scale, or opt.step()"
    raise ProtocolError(OWN_METHOD.format(optimizer=optimizer, name=name, lost=lost, fix=fix))
