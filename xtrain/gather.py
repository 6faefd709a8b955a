"""Gathering tensors from all ranks, with or without a way back for gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xtrain.contract import Collectives


def gather(tensor: Tensor, ranks: Collectives, sync_grads: bool) -> Tensor:
    """Return the tensors of all ranks, shape ``(world_size, *tensor.shape)``.

    Args:
        tensor: of the same shape on every rank.
        ranks: the processes of the run.
        sync_grads: let gradients flow back to the rank that a part came from.
    """
    if sync_grads and tensor.requires_grad:
        return _Gather.apply(tensor, ranks)  # type: ignore[no-any-return,no-untyped-call]
    return ranks.all_gather(tensor.detach())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Collectives) -> Tensor:
        ctx.ranks = ranks
        return ranks.all_gather(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        summed = ctx.ranks.all_reduce(gradient, "sum")  # every rank's loss may depend on this rank's part
        # The rank is data, not part of a compiled graph: ranks whose graphs differ would not meet.
        own = torch.tensor([ctx.ranks.rank], device=summed.device)
        return summed.index_select(0, own).squeeze(0), None
