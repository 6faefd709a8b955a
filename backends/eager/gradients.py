"""Dropping and clipping gradients, in as few calls as torch allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_ZERO_GRAD = Optimizer.zero_grad


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


def clip(parameters: Sequence[Tensor], value: float, algorithm: Literal["norm", "value"]) -> Tensor:
    """Clip the gradients of `parameters` in place; arguments and result are those of `Backend.clip_gradients`."""
    if algorithm == "norm":
        return clip_norm(parameters, value)
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
    gradients = [p.grad for p in parameters if p.grad is not None]
    if len({(type(g), g.device, g.dtype, g.layout) for g in gradients}) != 1 or type(gradients[0]) is not Tensor:
        norm: Tensor = nn.utils.clip_grad_norm_(parameters, largest)
        return norm
    with torch.no_grad():
        total: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, (total + 1e-6).reciprocal_().mul_(largest).clamp_(max=1.0))
    return total
