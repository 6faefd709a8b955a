"""ZeRO 3: parameters that the user's code reads or writes while they are in shards, where torch sees nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from xtrain.errors import ProtocolError, explain

from ..eager.callers import line_of, user_frame

_LINEAR = "deepspeed.runtime.zero.linear"  # stands in for torch.nn.functional.linear
_KNOWN: Any = Tensor  # its properties are descriptors, which torch declares as values

# What is right without the data.
_ANSWERS: dict[Any, Callable[..., Any]] = {
    _KNOWN.shape.__get__: lambda p: p.ds_shape,
    _KNOWN.ndim.__get__: lambda p: len(p.ds_shape),
    Tensor.size: lambda p, dim=None: p.ds_shape if dim is None else p.ds_shape[dim],
    Tensor.dim: lambda p: len(p.ds_shape),
    Tensor.numel: lambda p: p.ds_numel,
    Tensor.nelement: lambda p: p.ds_numel,
}
_PROPERTIES: tuple[str, ...] = (
    "grad",
    "requires_grad",
    "is_leaf",
    "grad_fn",
    "device",
    "dtype",
    "layout",
    "_version",
    "is_sparse",
)
_PROPERTIES += ("is_cuda", "is_cpu", "is_meta", "is_nested", "is_quantized", "_backward_hooks", "_grad")
_HARMLESS = {getattr(getattr(_KNOWN, name), get) for name in _PROPERTIES for get in ("__get__", "__set__")}
_HARMLESS |= {_KNOWN.grad.__delete__, Tensor.requires_grad_, Tensor.is_floating_point, Tensor.is_complex}
_HARMLESS |= {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.__repr__, Tensor.element_size}

_DETACHED = {_KNOWN.data.__get__, Tensor.detach}


class RefusesShards(TorchFunctionMode):
    """A context in which code of the user that reads or writes a parameter in shards gets an error, or the right shape.

    The data of such a parameter is an empty tensor: what is computed with it would be 0 or nothing, in silence.

    Args:
        names: of the parameters that DeepSpeed has put into shards.
    """

    def __init__(self, names: Mapping[Any, str]) -> None:
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        super().__init__()
        self._names, self._forwards = names, FWD_MODULE_STACK

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for value in _values(args):
            if type(value) is nn.Parameter and self._is_away(value) and func not in _HARMLESS:
                frame = user_frame(sys._getframe(1), ("deepspeed",), (_LINEAR,))
                if frame is None:
                    break
                if func in _ANSWERS:
                    return _ANSWERS[func](*args, **(kwargs or {}))
                raise _refusal(self._names.get(value, "parameter"), frame, func not in _DETACHED)
        return func(*args, **(kwargs or {}))

    def _is_away(self, parameter: Any) -> bool:
        """Return whether `parameter` is not whole, or only still is, so that what is written to it would be lost."""
        if not hasattr(parameter, "ds_status") or parameter.ds_active_sub_modules:
            return False
        return parameter.ds_status.name != "AVAILABLE" or not self._forwards


def _values(args: Sequence[Any]) -> Iterator[Any]:
    for value in args:
        if type(value) in (list, tuple):
            yield from value
        else:
            yield value


def _refusal(name: str, frame: FrameType, for_loss: bool) -> ProtocolError:
    received = f"a part of it in {frame.f_code.co_name}: ZeRO 3 keeps it in shards between forwards"
    fix = f"with self.trainer.backend.full_parameters(self.{name.split('.')[0]}): {line_of(frame)}"
    if for_loss and torch.is_grad_enabled():
        fix += "  # for a loss over parameters with its self.manual_backward(loss)"
    return ProtocolError(explain(f"a whole {name} to read or write", received, fix))
