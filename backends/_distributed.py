"""`torch.distributed` as the `Collectives` of a run: one group per process, joined once."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from xtrain.contract import Collectives, ReduceOp

T = TypeVar("T")

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class TorchCollectives(Collectives):
    """The collectives of the default process group.

    Args:
        device: where tensors must be for the group to send them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "mean") -> Tensor:
        reduced = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(reduced, _OPERATIONS["sum" if op == "mean" else op])
        if op == "mean":
            reduced /= self.world_size
        return reduced.to(tensor.device)

    def all_gather(self, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.detach().to(self.device).contiguous())
        return torch.stack(parts).to(tensor.device)

    def broadcast(self, value: T, source: int = 0) -> T:
        if isinstance(value, Tensor):
            sent = value.detach().to(self.device, copy=True)
            dist.broadcast(sent, source)
            return sent.to(value.device)  # type: ignore[return-value]
        box: list[Any] = [value]
        dist.broadcast_object_list(box, source, device=self.device)
        return box[0]  # type: ignore[no-any-return]

    def barrier(self) -> None:
        dist.barrier()


def join_processes(
    kind: Literal["gloo", "nccl"],
    device: torch.device,
    *,
    always: bool = False,
    timeout: timedelta = timedelta(minutes=10),
) -> Collectives:
    """Join the process group that the launcher's environment describes.

    Args:
        kind: the library that communicates.
        device: the device of this process.
        always: make a group of one process too, for libraries that insist on a group.
        timeout: how long a collective waits for the other processes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 and not always:
        return Collectives()
    if not dist.is_initialized():
        if world_size == 1:
            dist.init_process_group(kind, store=torch.distributed.HashStore(), rank=0, world_size=1, timeout=timeout)  # type: ignore[attr-defined]
        else:
            dist.init_process_group(kind, timeout=timeout)
    return TorchCollectives(device)
