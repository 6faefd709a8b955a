"""Norms and clipping of gradients of which each rank holds a part; norms are plain tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from .groups import local


def split(parameters: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of `parameters`: this rank's parts of those in shards, and those that are whole."""
    parts: list[Tensor] = []
    whole: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is not None:
            (parts if isinstance(parameter.grad, DTensor) else whole).append(local(parameter.grad))
    return parts, whole


@torch.no_grad()
def total_norm(parts: Sequence[Tensor], whole: Sequence[Tensor], ranks: Any, device: torch.device) -> Tensor:
    """Return the 2-norm of all gradients together, 0-dim, in their dtype, the same on every rank.

    Args:
        parts: this rank's, of gradients in shards.
        whole: gradients that are the same on every rank.
        ranks: the process group over which the shards are spread.
        device: on which that group communicates.
    """
    squares = _norm(parts, device).square()  # float64: a square of fp32 could overflow
    dist.all_reduce(squares, group=ranks)
    norm = (squares + _norm(whole, device).square()).sqrt()
    return norm.to((*parts, *whole)[0].dtype)


def _norm(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    filled = [t for t in tensors if t.numel()]
    if not filled:
        return torch.zeros((), dtype=torch.float64, device=device)
    return nn.utils.get_total_norm(filled).to(device, torch.float64)


@torch.no_grad()
def clip(tensors: list[Tensor], norm: Tensor, value: float, algorithm: Literal["norm", "value"]) -> None:
    """Clip in place, as `torch.nn.utils.clip_grad_norm_` and `torch.nn.utils.clip_grad_value_` do."""
    if algorithm == "value":
        torch._foreach_clamp_min_(tensors, -value)
        torch._foreach_clamp_max_(tensors, value)
        return
    factor = torch.clamp(value / (norm + 1e-6), max=1.0)
    for device in {t.device for t in tensors}:
        torch._foreach_mul_([t for t in tensors if t.device == device], factor.to(device))


class Part:
    """What the loss scaler takes for a parameter: one gradient, wherever it stands.

    Args:
        grad: the gradient, whose values are changed in place.
    """

    def __init__(self, grad: Tensor) -> None:
        self.grad = grad
