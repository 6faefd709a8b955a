"""The average of one optimizer's gradients over the ranks, made once, when they are first needed.

First the ranks meet: which optimizer it is, and which parameters have a gradient at all (a byte each), so it
may be missing on some of them. Then large gradients are reduced in place and small ones in flat buffers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from xtrain.collectives import FACTS, Collectives

from .process_group import finish

_NONE, _DENSE, _SPARSE = 0, 1, 2
_LARGE = 2**18  # bytes: from here on, a copy into a buffer costs more than a reduction of its own


@torch.no_grad()
def average(parameters: Sequence[Tensor], states: Sequence[int], world: int) -> None:
    """Make each gradient its mean over the ranks; where some ranks have none, theirs counts as zero.

    Args:
        parameters: in the same order on every rank.
        states: of each, what `agree` made of `state_of`: the same on every rank.
        world: number of ranks.
    """
    dense: list[Tensor] = []
    for parameter, state in zip(parameters, states, strict=True):
        if state == _SPARSE:
            _average_sparse(parameter, world)
        elif state == _DENSE:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dense.append(parameter.grad)
    if dense:
        _average_dense(dense, world)


def state_of(parameter: Tensor) -> int:
    """Return whether `parameter` has no gradient here, a dense or a sparse one."""
    if parameter.grad is None:
        return _NONE
    return _SPARSE if parameter.grad.is_sparse else _DENSE


def agree(facts: Sequence[int], call: str, ranks: Collectives) -> list[int]:
    """Return the largest over the ranks of each of `facts`, bytes.

    Args:
        facts: as many on every rank.
        call: names the optimizer and how many facts there are, see `Collectives.meet`.
        ranks: the processes of the run.

    Raises:
        ProtocolError: on every rank, if they are not at the same optimizer in the same step.
    """
    rows = ranks.meet(call, bytes(facts[:FACTS]))
    agreed = [max(column) for column in zip(*rows, strict=True)]
    if len(facts) > FACTS:
        rest = torch.tensor(facts[FACTS:], dtype=torch.uint8)
        finish(dist.all_reduce(rest, dist.ReduceOp.MAX, async_op=True), rest.device, call)
        agreed += rest.tolist()
    return agreed


def _average_dense(gradients: list[Tensor], world: int) -> None:
    torch._foreach_div_(gradients, world)  # before the sum, which could overflow in fp16
    works, buffers = [], []
    small: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        if gradient.nbytes >= _LARGE and gradient.is_contiguous():
            works.append(dist.all_reduce(gradient, async_op=True))
        else:
            small.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for group in small.values():
        flat = torch.cat([gradient.flatten() for gradient in group])
        works.append(dist.all_reduce(flat, async_op=True))
        buffers.append((flat, group))
    for work in works:
        finish(work, gradients[0].device, "average gradients")
    for flat, group in buffers:
        parts = flat.split([gradient.numel() for gradient in group])
        torch._foreach_copy_(group, [part.view_as(gradient) for part, gradient in zip(parts, group, strict=True)])


def _average_sparse(parameter: Tensor, world: int) -> None:
    """Average a gradient that is sparse on some rank; the others' become sparse in its first dimension."""
    gradient = parameter.grad
    if gradient is None:
        indices = torch.empty((1, 0), dtype=torch.long, device=parameter.device)
        values = torch.empty((0, *parameter.shape[1:]), dtype=parameter.dtype, device=parameter.device)
        gradient = torch.sparse_coo_tensor(indices, values, parameter.shape, check_invariants=False)
    whole = (gradient if gradient.is_sparse else gradient.to_sparse(1)).coalesce() / world
    finish(dist.all_reduce(whole, async_op=True), whole.device, "average a sparse gradient")
    parameter.grad = whole
