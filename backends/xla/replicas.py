"""Several replicas of a run, one per device, each in a process or thread that a launcher started."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from xtrain.collectives import Collectives, ReduceOp, form

from .runtime import Runtime

T = TypeVar("T")


class Replicas(Collectives):
    """Communication between replicas, traced into the graph like any computation.

    A header has to be read on the host, so there is none in a training step: replicas meet at log points.
    """

    meets_in_steps = False

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.rank = runtime.xr.global_ordinal()
        self.local_rank = runtime.xr.local_ordinal()
        self.world_size = runtime.xr.world_size()

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "mean", *, met: bool = False) -> Tensor:
        self._start(f"reduce ({op}) {form(tensor)}", met)
        kind, scale = ("sum", 1.0 / self.world_size) if op == "mean" else (op, 1.0)
        (reduced,) = self._runtime.all_reduce(kind, [self._here(tensor).clone()], scale)
        return self._settled(reduced).to(tensor.device)

    def all_gather(self, tensor: Tensor, *, met: bool = False) -> Tensor:
        self._start(f"gather {form(tensor)}", met)
        mine = torch.arange(self.world_size).view(-1, *[1] * tensor.dim()) == self.rank
        return self._sum_where(mine, tensor)

    def broadcast(self, value: T, source: int = 0) -> T:
        if isinstance(value, Tensor):
            return self._from(source, value)  # type: ignore[return-value]  # a tensor, as was given
        data = pickle.dumps(value)
        size = int(self.all_reduce(torch.tensor(len(data)), "max"))
        padded = torch.tensor(list(data.ljust(size, b"\0")), dtype=torch.int32)
        return pickle.loads(bytes(self._from(source, padded).tolist()))  # type: ignore[no-any-return]

    def barrier(self) -> None:
        self.all_reduce(torch.zeros(1), "sum").cpu()

    def average_gradients(self, parameters: Sequence[Tensor], whose: object) -> None:
        """Replace each gradient by its mean over the replicas; `whose` they are is said if replicas differ.

        What is reduced is a copy: XLA leaves a gradient alone that was changed in place before, as by
        clipping or by a second backward.
        """
        held = [p for p in parameters if p.grad is not None]
        if not held:
            return
        self._start(f"average {len(held)} gradients of {whose!r}")
        copies = [p.grad.detach().clone() for p in held if p.grad is not None]
        for parameter, mean in zip(held, self._runtime.all_reduce("sum", copies, 1.0 / self.world_size), strict=True):
            parameter.grad = mean

    def share_module(self, module: nn.Module) -> None:
        """Give every replica the parameters and buffers of rank 0."""
        with torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                tensor.copy_(self._from(0, tensor))

    def _exchange(self, row: Tensor) -> Tensor:
        return self.all_gather(row, met=True)

    def _start(self, call: str, between_steps: bool = False) -> None:
        """Say what is traced next. Between steps it becomes a graph of its own: what waits may differ by replica."""
        if between_steps:
            self._runtime.sync()
        where = self.position()
        self._runtime.say(f"{call}, {where}" if where else call)

    def _from(self, source: int, tensor: Tensor) -> Tensor:
        """Return the tensor of rank `source`."""
        self._start(f"broadcast {form(tensor)} of rank {source}")
        return self._sum_where(torch.tensor(self.rank == source), tensor)

    def _sum_where(self, mine: Tensor, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks of `tensor` where `mine`, 0 elsewhere.

        Every rank traces the same graph, in which its number is data: graphs that differ would not meet.
        """
        mask, here = self._here(mine), self._here(tensor)
        number = here.to(torch.int32) if here.dtype is torch.bool else here
        (total,) = self._runtime.all_reduce("sum", [torch.where(mask, number, torch.zeros_like(number))], 1.0)
        return self._settled(total).to(tensor.device, tensor.dtype)

    def _here(self, tensor: Tensor) -> Tensor:
        """Return `tensor` on the device as data: ``to`` makes a 0 or 1 part of the graph."""
        return tensor.detach() if tensor.device.type == "xla" else self._runtime.to_device([tensor])[0]

    def _settled(self, tensor: Tensor) -> Tensor:
        """In a rehearsal compute `tensor` now, while the threads are together; a TPU can do that later."""
        if self._runtime.rehearsal:
            self._runtime.sync()
        return tensor
