"""Communication between the ranks of a run, with or without a way back for gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
ReduceOp = Literal["mean", "sum", "max", "min"]


class Collectives:
    """Communication between the processes (or replicas) of a run; this class is a run of one.

    Every method must be called by all ranks. Tensors keep shape, dtype and device unless said
    otherwise.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "mean") -> Tensor:
        """Return the reduction of `tensor` over the ranks; `tensor` is left alone."""
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the ranks' tensors, shape ``(world_size, *tensor.shape)``."""
        return tensor.unsqueeze(0)

    def broadcast(self, value: T, source: int = 0) -> T:
        """Return `value` (a tensor or any picklable object) of rank `source`."""
        return value

    def barrier(self) -> None:
        """Wait for all ranks."""

    def all_true(self, flag: bool) -> Callable[[], bool]:
        """Start asking whether `flag` holds on every rank; the returned function waits for the answer."""
        lowest = self.all_reduce(torch.tensor(float(flag)), "min")
        return lambda: bool(lowest.item())


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
