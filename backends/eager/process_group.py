"""`torch.distributed` as the `Collectives` of a run: one process group, joined once."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from xtrain.collectives import Collectives, ReduceOp
from xtrain.launch.join import STORES, current_launch, join

T = TypeVar("T")

_OPERATIONS = {"mean": dist.ReduceOp.SUM, "sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
# A CUDA run talks about host values too: fingerprints, objects, which gradients there are.
_GROUPS = {"gloo": "gloo", "nccl": "cpu:gloo,cuda:nccl"}


class TorchCollectives(Collectives):
    """The collectives of the default process group.

    Args:
        device: of this process; tensors from elsewhere travel through it.
        local_rank: of this process.
    """

    def __init__(self, device: torch.device, local_rank: int) -> None:
        self.device, self.local_rank = device, local_rank
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def _own(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy of `tensor` that the group can send."""
        return tensor.detach().to(self.device, copy=True).contiguous()

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "mean") -> Tensor:
        reduced = self._own(tensor)
        if op == "mean" and not reduced.dtype.is_floating_point:
            reduced = reduced.double()
        dist.all_reduce(reduced, _OPERATIONS[op])
        if op == "mean":
            reduced /= self.world_size
        return reduced.to(tensor.device)

    def all_gather(self, tensor: Tensor) -> Tensor:
        own = self._own(tensor)
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(parts, own)
        return torch.stack(parts).to(tensor.device)

    def broadcast(self, value: T, source: int = 0) -> T:
        if isinstance(value, Tensor):
            sent = self._own(value)
            dist.broadcast(sent, source)
            return sent.to(value.device)  # type: ignore[return-value]
        box: list[Any] = [value]
        dist.broadcast_object_list(box, source)
        return box[0]  # type: ignore[no-any-return]

    def all_true(self, flag: bool) -> Callable[[], bool]:
        lowest = torch.tensor([flag], dtype=torch.uint8)
        work = dist.all_reduce(lowest, dist.ReduceOp.MIN, async_op=True)

        def answer() -> bool:
            work.wait()
            return bool(lowest.item())

        return answer

    def barrier(self) -> None:
        dist.barrier()


def join_processes(
    kind: Literal["gloo", "nccl"],
    device: torch.device,
    *,
    devices: int | None = None,
    always: bool = False,
    timeout: timedelta = timedelta(minutes=10),
) -> Collectives:
    """Join the process group that the launcher's environment describes, or start the missing processes.

    Args:
        kind: the library that communicates.
        device: the device of this process.
        devices: processes the script asks for on this machine; None takes what the launcher started.
        always: make a group of one process too, for libraries that insist on a group.
        timeout: how long a collective waits for the other processes.

    Raises:
        ConfigurationError: if `devices` contradicts the launcher.
        LaunchError: if the processes do not find each other.
    """
    world = join(devices)
    if not dist.is_initialized():
        if world is not None:
            place = world.launch
            store = STORES.PrefixStore("xtrain", world.store)
            dist.init_process_group(
                _GROUPS[kind], store=store, rank=place.rank, world_size=place.world_size, timeout=timeout
            )
        elif always:
            dist.init_process_group(_GROUPS[kind], store=STORES.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            return Collectives()
        # A group that outlives the interpreter now and then aborts it: its threads still hold tensors.
        atexit.register(_leave)
    if dist.get_world_size() == 1 and not always:
        return Collectives()
    return TorchCollectives(device, current_launch().local_rank)


@contextmanager
def random_stream(collectives: Collectives, device: torch.device) -> Iterator[None]:
    """Let torch draw other numbers on each rank inside the context, and the same on all of them after it.

    Noise and dropout that are the same on every rank would make their gradients worth less than they could
    be. Python's and NumPy's generators are left alone: what a step decides with them stays common.

    Args:
        collectives: of the run; one of a single process is left alone.
        device: where it draws, besides the CPU.
    """
    if collectives.world_size == 1:
        yield
        return
    seed = int(torch.randint(2**62, ()))  # from the common stream, so that a second run draws something else
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed + collectives.rank)
        yield


def gather_objects(value: Any, world_size: int) -> list[Any]:
    """Return what each rank passed (anything picklable), in order of rank."""
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, value)
    return gathered


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
