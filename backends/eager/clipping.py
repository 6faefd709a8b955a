"""The norm of gradients and the clip by it, in as few calls as torch allows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


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
        return nn.utils.clip_grad_norm_(parameters, largest)
    with torch.no_grad():
        total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, (total + 1e-6).reciprocal_().mul_(largest).clamp_(max=1.0))
    return total
