"""Objects of torchmetrics on ranks that ``torch.distributed`` does not know: they would stay each rank's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional

from xtrain.collectives import Collectives


class OverRanks:
    """What such an object asks to gather its states: it is given a tensor of this rank, and returns those of all.

    Args:
        ranks: the replicas of the run.
    """

    def __init__(self, ranks: Collectives) -> None:
        self._ranks = ranks

    def __call__(self, tensor: Tensor, group: Any = None) -> list[Tensor]:
        """Return the tensors of all ranks; as with torchmetrics' own function, their lengths may differ.

        A rank that was given no data has an empty tensor, of any dtype and number of dimensions.
        """
        own = [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        forms = self._ranks.gather_json(own, "gather a state of a metric")
        shape, dtype = next((form for form in forms if 0 not in form[0]), forms[0])
        largest = [max(form[0][i] for form in forms if len(form[0]) == len(shape)) for i in range(len(shape))]
        here = tensor if len(tensor.shape) == len(shape) else tensor.new_zeros([0] * len(shape))
        margins = [
            n for wide, size in zip(reversed(largest), reversed(here.shape), strict=True) for n in (0, wide - size)
        ]
        here = here.detach().to(getattr(torch, dtype))
        padded = functional.pad(here, margins) if any(margins) else here  # XLA pads no scalar
        whole = self._ranks.all_gather(padded, met=True)
        return [_cut(part, form) for part, (form, _) in zip(whole, forms, strict=True)]

    def __deepcopy__(self, memo: dict[int, Any]) -> OverRanks:
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # in a pickle None stands for torchmetrics' own


class Available:
    """Says to such an object that there are other ranks, in place of torchmetrics' own function `before`."""

    def __init__(self, before: Any) -> None:
        self.before = before

    def __call__(self) -> bool:
        """Return that there are others."""
        return True

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return _same, (self.before,)


def _same(value: Any) -> Any:
    return value


def _cut(part: Tensor, shape: Sequence[int]) -> Tensor:
    return part[tuple(slice(size) for size in shape)] if 0 not in shape else part[:0]


def unite(module: nn.Module, ranks: Collectives) -> list[Any]:
    """Let the objects of torchmetrics in `module`, itself included, reduce over `ranks`; return them.

    Those that reduce over processes of ``torch.distributed``, or by a function of their own, are left alone.
    """
    if ranks.world_size == 1 or (dist.is_available() and dist.is_initialized()) or not isinstance(module, nn.Module):
        return []
    found: list[Any] = [part for part in module.modules() if getattr(part, "dist_sync_fn", ranks) is None]
    for part in found:
        part.dist_sync_fn = OverRanks(ranks)
        part.distributed_available_fn = Available(part.distributed_available_fn)
    return found


@contextmanager
def united(module: nn.Module, ranks: Collectives) -> Iterator[None]:
    """Do the same for a run."""
    found = unite(module, ranks)
    try:
        yield
    finally:
        for part in found:
            part.dist_sync_fn, part.distributed_available_fn = None, part.distributed_available_fn.before
