"""Making, dropping and clipping gradients, in as few calls as torch allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_ZERO_GRAD = Optimizer.zero_grad
_run_engine: Any = torch.autograd.Variable._execution_engine.run_backward
with torch.inference_mode(False):
    _ONE = torch.ones(
        (), dtype=torch.float32, device="cpu"
    )  # where a backward begins, which torch makes anew each time


def backward_of(loss: Tensor, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    """Return ``loss.backward`` with its arguments; without any what does the same in less than half of the time."""
    plain = type(loss) is Tensor and loss.dtype is torch.float32 and not loss.dim() and loss.is_cpu
    # A hook of a loss may have written into the number; or somebody watches operations, as a recorder does.
    if args or kwargs or not plain or _ONE._version or torch._C._len_torch_dispatch_stack():
        return partial(loss.backward, *args, **kwargs)
    return partial(_run_engine, (loss,), (_ONE,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def drop_gradients(optimizer: Optimizer) -> bool:
    """Set the gradients of `optimizer` to None, as its ``zero_grad`` does, in a tenth of the time.

    Returns:
        Whether that was done; not for an optimizer with a ``zero_grad`` of its own.
    """
    if getattr(optimizer.zero_grad, "__func__", None) is not _ZERO_GRAD:
        return False
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
    return True


def clip_value(parameters: Sequence[Tensor], value: float) -> Tensor:
    """Clamp the gradients of `parameters` to `value` on both sides, in place; return their total norm before."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    nn.utils.clip_grad_value_(parameters, value)
    return norm


def clip_norm(parameters: Sequence[Tensor], largest: float) -> Tensor:
    """Scale the gradients of `parameters` so that their total 2-norm is at most `largest`, in place.

    The same operations, and so the same bits, as `torch.nn.utils.clip_grad_norm_`, without its walks over devices,
    dtypes and support for foreach, which cost more than the arithmetic of a small network.

    Args:
        parameters: of one optimizer.
        largest: infinity measures only.

    Returns:
        The total norm before, 0-dim.
    """
    gradients = [gradient for p in parameters if (gradient := p.grad) is not None]
    kinds = {(type(g), g.device, g.dtype, g.layout, g.requires_grad) for g in gradients}
    if len(kinds) != 1 or type(gradients[0]) is not Tensor or gradients[0].requires_grad:
        norm: Tensor = nn.utils.clip_grad_norm_(parameters, largest)
        return norm
    total: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    torch._foreach_mul_(gradients, (total + 1e-6).reciprocal_().mul_(largest).clamp_(max=1.0))
    return total
