"""Communication between the ranks of a run, with or without a way back for gradients.

Ranks are paired by the order of their calls, so every call first says what it is: `Collectives.meet`
exchanges one header of fixed length, in which what differs becomes an error that names it on every rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from xtrain.errors import ProtocolError, explain

T = TypeVar("T")
ReduceOp = Literal["mean", "sum", "max", "min"]

HEADER = 512
"""Bytes of a header, whatever the call: messages of different lengths would end the process."""
FACTS = 300
"""Bytes a call may add to its header."""
_DIGEST, _TEXT = 16, HEADER - FACTS  # then: the flag, the length of the facts (2 bytes), and the text


class Collectives:
    """Communication between the processes (or replicas) of a run; this class is a run of one.

    Every method must be called by all ranks. Tensors keep shape, dtype and device unless said
    otherwise.

    Attributes:
        rank: of this process, from 0.
        local_rank: of this process, among those of its machine.
        world_size: number of ranks.
        position: says in words where the run is; the run sets it, and every header has it.
        asks: says whether this rank wants the training to end; the run sets it, and every header has it.
        asked: whether any rank was heard to want that. It is the same on all ranks after each header.
        meets_in_steps: gradients are averaged after a header; else the ranks meet between steps only.
        equal_forwards: the forward itself talks to the other ranks, so an evaluation makes equally many on each.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    position: Callable[[], str] = staticmethod(lambda: "")
    asks: Callable[[], bool] = staticmethod(lambda: False)
    asked: bool = False
    equal_forwards: bool = False
    meets_in_steps: bool = True

    def meet(self, call: str, facts: bytes = b"", note: str = "") -> list[bytes]:
        """Say what this rank is about to do, and hear what the others say.

        Args:
            call: in words, the same on all ranks: "average the gradients of optimizer 0".
            facts: at most `FACTS` bytes, which may differ.
            note: said in an error beside `call`; it may differ, too.

        Returns:
            The facts of all ranks, in order of rank.

        Raises:
            ProtocolError: on every rank, if they are about to do different things.
        """
        if self.world_size == 1:
            return [facts]
        return self._heard(self._exchange(self._header(call, facts, note)))

    def _header(self, call: str, facts: bytes, note: str) -> Tensor:
        """Return what this rank says as a tensor of `HEADER` bytes."""
        where = self.position()
        text = f"{call}, {where}".encode() if where else call.encode()
        row = bytearray(HEADER)
        row[:_DIGEST] = hashlib.blake2b(text, digest_size=_DIGEST).digest()
        row[_DIGEST] = self.asks()
        row[_DIGEST + 1 : _DIGEST + 3] = len(facts).to_bytes(2, "little")
        said = (text + note.encode())[: _TEXT - _DIGEST - 3]
        row[_DIGEST + 3 : _DIGEST + 3 + len(said)] = said
        row[_TEXT : _TEXT + len(facts)] = facts
        return torch.frombuffer(row, dtype=torch.uint8)

    def _exchange(self, row: Tensor) -> Tensor:
        """Return the headers of all ranks, shape ``(world_size, HEADER)``."""
        return self.all_gather(row)

    def _heard(self, headers: Tensor) -> list[bytes]:
        rows = [row.tobytes() for row in headers.cpu().numpy()]
        if any(row[:_DIGEST] != rows[0][:_DIGEST] for row in rows):
            raise different_calls([row[_DIGEST + 3 : _TEXT].rstrip(b"\0").decode(errors="replace") for row in rows])
        self.asked = self.asked or any(row[_DIGEST] for row in rows)
        return [row[_TEXT : _TEXT + int.from_bytes(row[_DIGEST + 1 : _DIGEST + 3], "little")] for row in rows]

    def gather_json(self, value: Any, call: str) -> list[Any]:
        """Return what each rank passed, in order of rank: plain values, which no rank has to trust.

        Args:
            value: what JSON can hold; it may be of different length on each rank.
            call: see `meet`.
        """
        data = json.dumps(value).encode()
        lengths = [int.from_bytes(fact, "little") for fact in self.meet(call, len(data).to_bytes(8, "little"))]
        padded = torch.frombuffer(bytearray(data.ljust(max(lengths))), dtype=torch.uint8)
        return [json.loads(row.tobytes()) for row in self.all_gather(padded, met=True).cpu().numpy()]

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "mean", *, met: bool = False) -> Tensor:
        """Return the reduction of `tensor` over the ranks; `tensor` is left alone.

        Args:
            tensor: of the same shape on every rank.
            op: how.
            met: the ranks have met for this call already, so it needs no header.
        """
        return tensor

    def all_gather(self, tensor: Tensor, *, met: bool = False) -> Tensor:
        """Return the ranks' tensors, shape ``(world_size, *tensor.shape)``; arguments as in `all_reduce`."""
        return tensor.unsqueeze(0)

    def broadcast(self, value: T, source: int = 0) -> T:
        """Return `value` (a tensor or any picklable object) of rank `source`.

        An object travels as a pickle, which can run code where it is read: the ranks trust each other, and
        the network they meet in. `gather_json` needs no such trust.
        """
        return value

    def barrier(self) -> None:
        """Wait for all ranks."""

    def all_true(self, flag: bool) -> Callable[[], bool]:
        """Start asking whether `flag` holds on every rank; the returned function waits for the answer."""
        lowest = self.all_reduce(torch.tensor(float(flag)), "min")
        return lambda: bool(lowest.item())


def different_calls(texts: Sequence[str]) -> ProtocolError:
    """Return the error of ranks that are about to do different things.

    Args:
        texts: what each is about to do, in order of rank; not all the same.
    """
    other = next(rank for rank, text in enumerate(texts) if text != texts[0] or rank == len(texts) - 1)
    more = "" if len(texts) == 2 else f" ({sum(text == texts[0] for text in texts)} of {len(texts)} as rank 0)"
    return ProtocolError(
        explain(
            "every rank to make the same calls in the same order",
            f"rank 0 is to {texts[0]}; rank {other} is to {texts[other]}{more}",
            "decide from what is the same on all ranks: batch_idx, self.all_gather(...), or a metric of an epoch "
            "with sync_dist=True",
        )
    )


def form(tensor: Tensor) -> str:
    """Return shape and dtype of `tensor`, in words."""
    return f"a tensor of shape {tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}"


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
