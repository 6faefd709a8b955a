"""Averages that start while backward still runs, where that cannot change the result.

The gradients of one optimizer lie in buckets. A bucket whose gradients have all arrived is copied into a
buffer and reduced at once, while autograd goes on to the next layers. This is a bet that nothing will touch
these gradients before they are needed. It is made only for a backward that was directly followed by that
need the last time, and it is checked: when the gradients are needed, the ranks tell each other which
buckets have changed since; those are thrown away, and averaged as if nothing had been tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ._averaging import NONE, SPARSE, agree, average, state_of

_PATIENCE = 3  # a bucket that is thrown away so often in a row is not tried again: hooks change it, or it is sparse


@dataclass
class Reductions:
    """How often gradients were averaged, and when.

    Attributes:
        early: buckets whose reduction started in backward and was used.
        thrown: buckets whose reduction started in backward, but whose gradients had changed on some rank.
        late: times that an optimizer had gradients left to average when they were needed.
    """

    early: int = 0
    thrown: int = 0
    late: int = 0


class _Bucket:
    """Some parameters of one dtype on one device, and the buffer in which their gradients travel."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.awaited: set[int] = set()  # ids of the parameters whose gradients have not arrived yet
        self.misses = 0
        self._flat: Tensor | None = None
        self._work: Any = None
        self._seen: list[tuple[Tensor, int] | None] = []

    def start(self, group: Any) -> None:
        """Copy the gradients as they are now, and begin to sum them over the ranks."""
        self._seen = [None if p.grad is None else (p.grad, p.grad._version) for p in self.parameters]
        if self._flat is None:
            self._flat = self.parameters[0].new_empty(sum(p.numel() for p in self.parameters))
        views = self._views()
        copied = [(v, p.grad) for v, p in zip(views, self.parameters, strict=True) if p.grad is not None]
        if len(copied) < len(views) or any(gradient.is_sparse for _, gradient in copied):
            self._flat.zero_()
            copied = [(view, gradient) for view, gradient in copied if not gradient.is_sparse]
        if copied:
            torch._foreach_copy_([view for view, _ in copied], [gradient for _, gradient in copied])
        self._flat /= dist.get_world_size()  # before the sum, which could overflow in fp16
        self._work = dist.all_reduce(self._flat, group=group, async_op=True)

    def changed(self) -> bool:
        """Return whether the buffer is not what the gradients are."""
        if self._work is None:
            return True
        for parameter, seen in zip(self.parameters, self._seen, strict=True):
            gradient = parameter.grad
            if seen is None or gradient is None:
                if not (seen is None and gradient is None):
                    return True
            elif gradient is not seen[0] or gradient._version != seen[1] or gradient.is_sparse:
                return True
        return False

    def finish(self) -> None:
        """Wait for the sum."""
        self._work.wait()
        self._work, self._seen = None, []

    def write(self, states: dict[int, int]) -> None:
        """Put the averages where the gradients were; what no rank has stays None."""
        written, averages = [], []
        for parameter, view in zip(self.parameters, self._views(), strict=True):
            if states.get(id(parameter), NONE) == NONE:
                continue
            if parameter.grad is None:
                parameter.grad = view.clone()
            else:
                written.append(parameter.grad)
                averages.append(view)
        if written:
            torch._foreach_copy_(written, averages)

    def _views(self) -> list[Tensor]:
        assert self._flat is not None
        parts = self._flat.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]


class _Early:
    """The buckets of one optimizer, and when they are filled.

    Args:
        buckets: in the order in which gradients are expected.
        group: a process group of its own. The ranks start the same reductions in the same order there,
            whatever they say to each other elsewhere.
    """

    def __init__(self, buckets: list[_Bucket], group: Any) -> None:
        self.buckets, self.group = buckets, group
        self.started: list[_Bucket] = []  # since the ranks last agreed
        self._waiting: list[_Bucket] = []
        self._needed: dict[tuple[int, int], bool] = {}
        self._last: tuple[int, int] | None = None
        self._count = 0  # backwards since the gradients were last needed or zeroed
        self.hooks = [
            parameter.register_post_accumulate_grad_hook(self._arrived)
            for bucket in buckets
            for parameter in bucket.parameters
        ]
        self._bucket_of = {id(p): bucket for bucket in buckets for p in bucket.parameters}

    def expect(self, number: int) -> None:
        """Prepare for backward `number` of the training step; bet on it if it was the last one the last time."""
        self._outdate()
        place = self._last = number, self._count
        self._count += 1
        if not self.started and self._needed.get(place, False):
            self._begin()
            for bucket in self._waiting:
                bucket.awaited = {id(p) for p in bucket.parameters}

    def zeroed(self) -> None:
        """Note that the gradients were dropped."""
        self._outdate()
        self._count = 0

    def _outdate(self) -> None:
        if self._last is not None:  # what that backward left was not needed as it was
            self._needed[self._last] = False
            self._last = None

    def _begin(self) -> None:
        self.started = [bucket for bucket in self.buckets if bucket.misses < _PATIENCE]
        self._waiting = list(self.started)

    @torch.no_grad()
    def _arrived(self, parameter: Tensor) -> None:
        if self._waiting:
            self._bucket_of[id(parameter)].awaited.discard(id(parameter))
            while self._waiting and not self._waiting[0].awaited:
                self._waiting.pop(0).start(self.group)

    @torch.no_grad()
    def start_rest(self) -> None:
        """Start what has not arrived completely: every rank starts all buckets, or none."""
        while self._waiting:
            self._waiting.pop(0).start(self.group)

    def finalize(self, parameters: Sequence[Tensor], position: int, width: int, counts: Reductions) -> None:
        """Average the gradients; see `average_gradients`."""
        if self._last is not None:
            self._needed[self._last] = True
            self._last = None
        self._count = 0
        own = [state_of(p) for p in parameters]
        stale = [int(bucket.changed()) for bucket in self.buckets]
        agreed = agree([*own, *stale, int(bool(self.started))], position, width)
        states = dict(zip(map(id, parameters), agreed[: len(own)], strict=True))
        done = self._settle(states, agreed[len(own) : -1], counts) if agreed[-1] else set()
        rest = [p for p in parameters if id(p) not in done and states[id(p)] != NONE]
        if rest:
            counts.late += 1
            average(rest, [states[id(p)] for p in rest])

    def _settle(self, states: dict[int, int], stale: Sequence[int], counts: Reductions) -> set[int]:
        """Use what was started on some rank, or throw it away; return the ids of the averaged parameters."""
        if not self.started:  # another rank has started: it waits for this one
            self._begin()
            self.start_rest()
        done: set[int] = set()
        for bucket, changed in zip(self.buckets, stale, strict=True):
            if bucket not in self.started:
                continue
            bucket.finish()
            if changed or any(states.get(id(p)) == SPARSE for p in bucket.parameters):
                counts.thrown += 1
                bucket.misses += 1
                continue
            counts.early += 1
            bucket.misses = 0
            bucket.write(states)
            done |= {id(p) for p in bucket.parameters}
        self.started = []
        return done


class Overlap:
    """Starts averages early, for all optimizers of a run; a context around each backward.

    Args:
        optimizers: the parameters of each.
        bucket_bytes: size of a bucket. Gradients that fill less than two have nothing to overlap with.
        timeout: see `xtrain_backends._distributed.join_processes`.

    Attributes:
        counts: what came of it.
    """

    def __init__(self, optimizers: Sequence[Sequence[Tensor]], bucket_bytes: float, timeout: timedelta) -> None:
        self.counts = Reductions()
        self._optimizers = [_Early([], None) for _ in optimizers]
        for position, parameters in enumerate(optimizers):
            buckets = _fill(parameters, bucket_bytes)
            if len(buckets) > 1:
                self._optimizers[position] = _Early(buckets, dist.new_group(timeout=timeout))
        sizes = zip(optimizers, self._optimizers, strict=True)
        self._width = max((len(parameters) + len(early.buckets) + 1 for parameters, early in sizes), default=0)
        self._backwards = 0

    def __enter__(self) -> None:
        for early in self._optimizers:
            early.expect(self._backwards)
        self._backwards += 1

    def __exit__(self, *_: object) -> None:
        for early in self._optimizers:  # also after an exception: the other ranks have started theirs
            early.start_rest()

    def zeroed(self, position: int) -> None:
        """Note that the gradients of the optimizer at `position` were dropped."""
        self._optimizers[position].zeroed()

    @torch.no_grad()
    def finalize(self, parameters: Sequence[Tensor], position: int) -> None:
        """Average the gradients of the optimizer at `position`; see `average_gradients`."""
        self._optimizers[position].finalize(parameters, position, self._width, self.counts)

    def boundary(self) -> None:
        """End a training step."""
        self._backwards = 0

    def close(self) -> None:
        """Remove the hooks, and leave the process groups."""
        for early in self._optimizers:
            for hook in early.hooks:
                hook.remove()
            if early.group is not None:
                dist.destroy_process_group(early.group)
            early.group, early.hooks = None, []


def _fill(parameters: Iterable[Tensor], size: float) -> list[_Bucket]:
    """Return buckets of about `size` bytes: from the last parameter, whose gradient comes first, to the first."""
    filled: list[_Bucket] = []
    open_ones: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in reversed([p for p in parameters if p.requires_grad and p.is_leaf]):
        kind = parameter.device, parameter.dtype
        held = open_ones.setdefault(kind, [])
        held.append(parameter)
        if sum(p.nbytes for p in held) >= size:
            filled.append(_Bucket(open_ones.pop(kind)))
    return filled + [_Bucket(held) for held in open_ones.values()]
