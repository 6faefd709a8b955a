"""Gradients that wait for their reduction are not in ``.grad`` yet: who looks for them there is told so.

torch's own `clip_grad_norm_` would find None, and clip nothing, in silence.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from xtrain.errors import ProtocolError, explain

from ..eager.callers import line_of, user_frame

_KNOWING = ("torch.distributed.fsdp", "copy")  # FSDP2 itself; a copy has no gradients that wait
_DTensor: Any = DTensor  # for mypy, .grad is a value of each tensor
_true: Any = Tensor.grad  # a descriptor, which torch declares as a value
_waiting: dict[Tensor, str] = {}


class _Grad:
    """Stands before torch's own ``DTensor.grad`` as long as a gradient waits, and not a moment longer."""

    def __get__(self, parameter: Any, kind: type | None = None) -> Any:
        if parameter is None:
            return _true
        _check(parameter, sys._getframe(1))
        return _true.__get__(parameter)

    def __set__(self, parameter: Any, value: Any) -> None:
        _check(parameter, sys._getframe(1))
        _true.__set__(parameter, value)

    def __delete__(self, parameter: Any) -> None:
        _check(parameter, sys._getframe(1))
        _true.__delete__(parameter)


def wait_for_reduction(shards: Iterable[Tensor], names: Mapping[Tensor, str]) -> None:
    """Refuse from now on that the user's code reads or writes the ``.grad`` of `shards`.

    Args:
        shards: parameters of which this rank has a gradient that is not reduced.
        names: of the parameters of the run.
    """
    _waiting.update((shard, names.get(shard, "parameter")) for shard in shards)
    if _waiting and "grad" not in vars(DTensor):
        _DTensor.grad = _Grad()


def wait_no_more(shards: Iterable[Tensor]) -> None:
    """Allow it again: the gradients of `shards` were reduced, or dropped."""
    for shard in shards:
        _waiting.pop(shard, None)
    if not _waiting and "grad" in vars(DTensor):
        del _DTensor.grad


def _check(parameter: Tensor, frame: FrameType) -> None:
    name = _waiting.get(parameter)
    user = None if name is None else user_frame(frame, _KNOWING)
    if user is None:
        return
    received = (
        f"{name}.grad in {user.f_code.co_name}, before it was reduced into shards: torch would find None there, "
        "and clip or change nothing"
    )
    fix = (
        "self.clip_gradients(opt, gradient_clip_val=1.0), or opt.zero_grad(), which know where it is; or first "
        f"opt.finalize(), then: {line_of(user)}"
    )
    raise ProtocolError(explain("gradients to be used after their reduction", received, fix))
