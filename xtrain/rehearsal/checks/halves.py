"""Batches as a training reads them from memory, and the two halves of each that two processes get."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from xtrain.data.datamodule import LightningDataModule
from xtrain.rehearsal.subject import Subject
from xtrain.tensors import tensors_in


class Batches:
    """A loader of these batches; each time they are read they are as they were.

    Args:
        batches: an epoch.
    """

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return (copy.deepcopy(batch) for batch in self._batches)


def reading(subject: Subject, batches: Sequence[Any]) -> Subject:
    """Return `subject` with these batches in place of its loader; None for all of them: it has no loader."""
    if all(batch is None for batch in batches):
        return subject
    loader: Any = Batches(batches)
    if isinstance(subject.data, LightningDataModule):
        module = copy.copy(subject.data)
        module.train_dataloader = lambda: loader  # type: ignore[method-assign]
        loader = module
    return replace(subject, data=loader)


def halved(batches: Sequence[Any]) -> list[list[Any]] | str:
    """Return the first halves of all batches and the second ones, or why that cannot be."""
    parts: list[list[Any]] = [[], []]
    for batch in batches:
        rows = {t.shape[0] if t.dim() else 0 for t in tensors_in(batch)}
        if len(rows) > 1:
            return f"a batch with tensors of {' and '.join(map(str, sorted(rows)))} rows cannot be divided in two"
        size = next(iter(rows), 0)
        if size % 2 or (rows and not size):
            return f"a batch of {size} samples cannot be divided in two"
        try:
            for part, first in zip(parts, (True, False), strict=True):
                part.append(_half(batch, size, first))
        except TypeError as error:
            return str(error)
    return parts


def _half(data: Any, size: int, first: bool) -> Any:
    if isinstance(data, Tensor):
        return data[: size // 2] if first else data[size // 2 :]
    if isinstance(data, dict):
        return {key: _half(value, size, first) for key, value in data.items()}
    if type(data) in (list, tuple):
        plain = all(item is None or isinstance(item, str | int | float) for item in data)
        if plain and size and len(data) == size:
            return data[: size // 2] if first else data[size // 2 :]
        return type(data)(_half(item, size, first) for item in data)
    if isinstance(data, tuple) and hasattr(data, "_make"):
        return data._make(_half(item, size, first) for item in data)
    if data is None or isinstance(data, str | int | float):
        return data
    raise TypeError(f"a batch with a {type(data).__name__} cannot be divided in two")
