"""`torch.distributed` as the `Collectives` of a run: one process group, joined once."""

from __future__ import annotations

import atexit
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from xtrain.collectives import HEADER, Collectives, ReduceOp, form
from xtrain.launch.join import current_launch, join, raise_failure
from xtrain.launch.stores import STORES

from .settle import let_threads_settle

T = TypeVar("T")

_OPERATIONS = {"mean": dist.ReduceOp.SUM, "sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
# The second name is the older one.
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# gloo's thread lets go of a message a moment after the wait for it is over. Were it the last to hold the tensors, it
# would need the interpreter's lock, which aborts a process that has come to its end by then.
_RECENT: deque[tuple[Tensor, Tensor]] = deque(maxlen=8)
_SLICE = timedelta(seconds=0.5)
_BETWEEN_TWO = (12, 13, 14)  # send, receive, receive from anybody: a slice that ends in vain closes the connection
_WORK: Any = dist.Work
_wait = _WORK.wait


class TorchCollectives(Collectives):
    """The collectives of the default process group.

    Args:
        device: of this process; tensors from elsewhere travel through it.
        local_rank: of this process.
    """

    def __init__(self, device: torch.device, local_rank: int) -> None:
        self.device, self.local_rank = device, local_rank
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._unheard: deque[Callable[[], None]] = deque()  # headers that were sent and not looked at yet

    def meet(self, call: str, facts: bytes = b"", note: str = "") -> list[bytes]:
        return self._start(call, facts, note)() if self.world_size > 1 else [facts]

    def _start(self, call: str, facts: bytes, note: str = "") -> Callable[[], list[bytes]]:
        """Send a header; the returned function waits for those of the others.

        Earlier headers are looked at first: what differs is told before this rank waits in vain.
        """
        sent = self._header(call, facts, note)
        received = torch.empty((self.world_size, HEADER), dtype=torch.uint8)
        _RECENT.append((sent, received))
        work = _ALL_GATHER(received.view(-1), sent, async_op=True)
        heard: list[bytes] = []

        def hear() -> None:
            finish(work, sent.device, f"{call}, {self.position()}")
            heard.extend(self._heard(received))

        def answer() -> list[bytes]:
            while not heard:
                self._unheard.popleft()()
            return heard

        self._unheard.append(hear)
        return answer

    def _own(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy of `tensor` that the group can send."""
        return tensor.detach().to(self.device, copy=True).contiguous()

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "mean", *, met: bool = False) -> Tensor:
        if not met:
            self.meet(f"reduce ({op}) {form(tensor)}")
        reduced = self._own(tensor)
        if op == "mean" and not (reduced.dtype.is_floating_point or reduced.dtype.is_complex):
            reduced = reduced.double()
        finish(dist.all_reduce(reduced, _OPERATIONS[op], async_op=True), self.device, f"reduce ({op})")
        if op == "mean":
            reduced /= self.world_size
        return reduced.to(tensor.device)

    def all_gather(self, tensor: Tensor, *, met: bool = False) -> Tensor:
        if not met:
            self.meet(f"gather {form(tensor)}")
        own = self._own(tensor)
        sent = _bits(own)
        parts = torch.empty(self.world_size * sent.numel(), dtype=torch.uint8, device=self.device)
        if sent.numel():
            finish(_ALL_GATHER(parts, sent, async_op=True), self.device, "gather")
        return parts.view(own.dtype).view(self.world_size, *own.shape).to(tensor.device)

    def broadcast(self, value: T, source: int = 0) -> T:
        if isinstance(value, Tensor):
            self.meet(f"broadcast {form(value)} of rank {source}")
            own = self._own(value)
            sent = _bits(own)
            if sent.numel():
                finish(dist.broadcast(sent, source, async_op=True), self.device, "broadcast")
            return sent.view(own.dtype).view(own.shape).to(value.device)  # type: ignore[return-value]
        return self._broadcast_object(value, source)

    def _broadcast_object(self, value: T, source: int) -> T:
        data = pickle.dumps(value) if self.rank == source else b""
        sizes = self.meet(f"broadcast an object of rank {source}", len(data).to_bytes(8, "little"))
        row = torch.frombuffer(bytearray(data.ljust(int.from_bytes(sizes[source], "little"))), dtype=torch.uint8)
        finish(dist.broadcast(row, source, async_op=True), row.device, "broadcast")
        return value if self.rank == source else pickle.loads(row.numpy().tobytes())

    def all_true(self, flag: bool) -> Callable[[], bool]:
        answer = self._start("ask whether every rank has another batch", bytes([flag]))
        return lambda: all(map(any, answer()))

    def barrier(self) -> None:
        self.meet("wait for all ranks")


def _wait_in_slices(work: Any, timeout: timedelta = timedelta(0)) -> bool:
    """Stand in for ``Work.wait``, in which FSDP2 and DeepSpeed wait for minutes in one call, deaf to Ctrl-C."""
    if not timeout and work._get_op_type() not in _BETWEEN_TWO:
        _wait_until_over(work)
    return bool(_wait(work, timeout))


def _wait_until_over(work: Any) -> None:
    """Wait in slices of half a second until a collective has ended, well or not: its next `wait` tells which.

    A slice that ends in vain looks like a failure, and the collective may end right after it: so only that wait counts.
    Some collectives of gloo never say that they are completed: a failure that came early was no slice in vain.
    """
    while True:
        begun = time.monotonic()
        with suppress(RuntimeError):
            work.wait(_SLICE)
            return
        if work.is_completed() or time.monotonic() - begun < _SLICE.total_seconds() / 2:
            return
        raise_failure()


def finish(work: Any, device: torch.device, call: str) -> None:
    """Wait for the other ranks in slices of half a second: in between Ctrl-C works, and a failed rank is noticed.

    Args:
        work: what a collective returned with ``async_op=True``.
        device: of its tensors; away from the CPU nobody waits here, but the device itself.
        call: in words, for the error of a rank that waited in vain.

    Raises:
        RankFailedError: if another rank says that it failed.
        RuntimeError: if the others are gone, or do not come in time.
    """
    if device.type != "cpu":
        work.wait()
        return
    _wait_until_over(work)
    try:
        work.wait(_SLICE)
    except RuntimeError as error:
        raise RuntimeError(f"{error} (it was to {call})") from error


def _bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a contiguous tensor, for the types that a group does not know."""
    return tensor.view(-1).view(torch.uint8)


def join_processes(
    kind: str,
    device: torch.device,
    *,
    devices: int | None = None,
    always: bool = False,
    timeout: timedelta = timedelta(minutes=10),
) -> Collectives:
    """Join the process group that the launcher's environment describes, or start the missing processes.

    Args:
        kind: the library that communicates: ``"gloo"``, ``"nccl"``, or what the device has.
        device: the device of this process.
        devices: processes the script asks for on this machine; None takes what the launcher started.
        always: make a group of one process too, for libraries that insist on a group.
        timeout: how long a collective waits for the other processes.

    Raises:
        ConfigurationError: if `devices` contradicts the launcher.
        LaunchError: if the processes do not find each other.
    """
    world = join(devices)
    # A run on another device talks about host values too: fingerprints, objects, which gradients there are.
    group = "gloo" if kind == "gloo" else f"cpu:gloo,{device.type}:{kind}"
    if not dist.is_initialized():
        if world is not None:
            place = world.launch
            store = STORES.PrefixStore("group", world.store)
            if kind == "gloo":  # elsewhere nobody waits there, but for the device itself
                _WORK.wait = _wait_in_slices
            dist.init_process_group(group, store=store, rank=place.rank, world_size=place.world_size, timeout=timeout)
        elif always:
            dist.init_process_group(group, store=STORES.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            return Collectives()
        atexit.register(_leave)
    atexit.unregister(let_threads_settle)  # once, whoever made the group, and however many runs there are
    atexit.register(let_threads_settle)
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


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
