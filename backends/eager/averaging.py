"""The average of one optimizer's gradients over the ranks, made once, when they are first needed.

First the ranks agree on which parameters have a gradient at all (a byte each), so it may be missing on
some of them; then large gradients are reduced in place and small ones in flat buffers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from xtrain.errors import ProtocolError, explain

_NONE, _DENSE, _SPARSE = 0, 1, 2
_LARGE = 2**18  # bytes: from here on, a copy into a buffer costs more than a reduction of its own


def average_gradients(parameters: Sequence[Tensor], position: int, width: int) -> None:
    """Make each gradient its mean over the ranks; where some ranks have none, theirs counts as zero.

    Args:
        parameters: of one optimizer, in the same order on every rank.
        position: number of the optimizer, below 255; all ranks must be at the same.
        width: the largest number of parameters of any optimizer of the run.

    Raises:
        ProtocolError: if the ranks step different optimizers.
    """
    average(parameters, agree([state_of(p) for p in parameters], position, width))


@torch.no_grad()
def average(parameters: Sequence[Tensor], states: Sequence[int]) -> None:
    """Make each gradient its mean over the ranks.

    Args:
        parameters: in the same order on every rank.
        states: of each, what `agree` made of `state_of`: the same on every rank.
    """
    world = dist.get_world_size()
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


def agree(facts: list[int], position: int, width: int) -> list[int]:
    """Return the largest over the ranks of each of `facts`, bytes about the optimizer at `position`.

    Args:
        facts: as many on every rank.
        position: see `average_gradients`.
        width: the largest number of facts about any optimizer.

    Raises:
        ProtocolError: if the ranks are at different optimizers.
    """
    # One length for all optimizers: with different ones, gloo would end the process without a word.
    header = [position, 255 - position, *facts, *[0] * (width - len(facts))]
    agreed = torch.tensor(header, dtype=torch.uint8)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    highest, lowest, *whole = agreed.tolist()
    lowest = 255 - lowest
    if highest != lowest:
        other = lowest if highest == position else highest
        raise ProtocolError(
            explain(
                "every rank to clip or step the same optimizer",
                f"optimizer {position} on this rank, optimizer {other} on another",
                "decide from batch_idx or from self.all_gather(...), which are the same everywhere",
            )
        )
    return whole[: len(facts)]


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
        work.wait()
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
    dist.all_reduce(whole)
    parameter.grad = whole
