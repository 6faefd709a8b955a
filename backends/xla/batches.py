"""Batches on their way to the device: the smaller last one, and what can be split over a mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from xtrain.errors import ConfigurationError, explain
from xtrain.tensors import map_tensors, tensors_in

LAST_BATCH = ("compile", "drop", "pad")
Signature = tuple[tuple[tuple[int, ...], str], ...]


def signature(batch: Any) -> Signature:
    """Return the shapes and dtypes of `batch`: a graph serves batches of one signature."""
    return tuple((tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in tensors_in(batch))


def row_count(batch: Any) -> int | None:
    """Return the first dimension of the first tensor that has one, or None."""
    return next((t.size(0) for t in tensors_in(batch) if t.dim()), None)


class TrainingBatches:
    """A training loader whose smaller last batch is treated as the user chose.

    Args:
        loader: any iterable of batches; its attributes stay available.
        mode: ``"compile"`` passes it on, ``"drop"`` leaves it out, ``"pad"`` fills it up and marks the
            real rows, see `padded`.
        smaller: told about a smaller batch that is passed on or left out, and the full number of rows.
    """

    def __init__(self, loader: Any, mode: str, smaller: Callable[[Any, int], None]) -> None:
        self._loader, self._mode, self._smaller = loader, mode, smaller

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __len__(self) -> int:
        if self._mode == "drop":
            raise TypeError("how many batches are left out is only known at the end")
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        full: int | None = None
        for batch in self._loader:
            rows = row_count(batch)
            full = full or rows
            if self._mode == "pad":
                yield padded(batch, rows or 0, full or 0)
            elif rows is None or full is None or rows >= full:
                yield batch
            else:
                self._smaller(batch, full)
                if self._mode == "compile":
                    yield batch


def padded(batch: Any, rows: int, full: int) -> Any:
    """Return `batch` with `full` rows, the first one repeated, and its mask.

    Args:
        batch: a dict gets ``batch["mask"]``, a tuple or list one more item at its end.
        rows: how many it has.
        full: how many it shall have.

    Returns:
        The batch; its mask is a float tensor of shape ``(full,)``, 1 for the real rows.

    Raises:
        ConfigurationError: for a batch with no place for a mask.
    """
    with_place = type(batch) in (tuple, list) or (isinstance(batch, dict) and "mask" not in batch)
    if not with_place:
        received = "a dict with a key 'mask' of its own" if isinstance(batch, dict) else f"a {type(batch).__name__}"
        fix = "a collate_fn that returns {'x': x, 'y': y} or (x, y), or last_batch='drop'"
        expected = "batches with a place for the mask of last_batch='pad': dicts, tuples or lists"
        raise ConfigurationError(explain(expected, received, fix))

    def fill(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.size(0) != rows:
            return tensor
        return torch.cat([tensor, tensor[:1].expand(full - rows, *tensor.shape[1:])])

    filled = map_tensors(fill, batch) if rows < full else batch
    mask = (torch.arange(full) < rows).float()
    return {**filled, "mask": mask} if isinstance(filled, dict) else type(filled)([*filled, mask])
