"""Parameters from before they were sharded: who kept them elsewhere is told, because they are empty during the run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xtrain.errors import ProtocolError, explain

from ..eager.callers import line_of, user_frame

# What says nothing about values, gradients or shapes: sets and dicts of parameters, an optimizer that is made of them
# and refused with a fix of its own, and hooks, which go on from the shards.
_ALLOWED = {
    *("__hash__", "__repr__", "_backward_hooks", "_post_accumulate_grad_hooks", "register_hook"),
    *("register_post_accumulate_grad_hook", "is_leaf", "requires_grad", "dtype", "device", "layout"),
    *("is_floating_point", "is_complex", "is_sparse", "grad_fn", "retains_grad"),
}


class StaleParameter(nn.Parameter):
    """What a parameter in shards was before, for as long as it is in shards; its memory is with the shards."""

    stale_name: str
    user_kind: type[nn.Parameter]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do what is harmless; refuse the rest with the line that uses the parameter."""
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "__delete__"):  # of an attribute
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        frame = None if name in _ALLOWED else user_frame(sys._getframe(1), ("torch.distributed.fsdp",), ("copy",))
        if frame is None:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        stale = next((a.stale_name for a in _tensors(args) if isinstance(a, StaleParameter)), "a parameter")
        received = (
            f"{stale} as it was before it was sharded, in {frame.f_code.co_name}: {line_of(frame)}. "
            "It is empty during the run, so this would compute nothing"
        )
        fix = "take parameters from the module where they are used: self.net.parameters(), no list kept in __init__"
        raise ProtocolError(explain("parameters of the run", received, fix))


def _tensors(arguments: Any) -> Iterable[Any]:
    for argument in arguments:
        yield from _tensors(argument) if isinstance(argument, (list, tuple)) else (argument,)


def make_stale(originals: Mapping[nn.Parameter, str]) -> None:
    """Empty parameters that stand in shards now, and refuse their use from now on.

    Args:
        originals: with their names.
    """
    for original, name in originals.items():
        original.data = original.data.new_empty(0)  # the memory, not the object: it comes back
        kind: Any = type(original)
        stale: Any = original
        stale.__class__ = StaleParameter
        stale.stale_name, stale.user_kind = name, kind


def make_fresh(original: nn.Parameter, value: Tensor, requires_grad: bool) -> None:
    """Let a parameter be what it was, with the value that training came to."""
    if isinstance(original, StaleParameter):
        stale: Any = original
        stale.__class__ = original.user_kind
        del stale.stale_name, stale.user_kind
    original.data = value
    original.requires_grad_(requires_grad)
