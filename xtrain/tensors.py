"""Walks over the tensors of nested data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor


def map_tensors(function: Callable[[Tensor], Any], data: Any) -> Any:
    """Return `data` with `function` applied to each tensor in nested dicts, sequences and dataclasses.

    Containers keep their type (namedtuples too). An object with a ``to`` method that is no tensor
    is left to the user's ``transfer_batch_to_device``.
    """
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, dict):
        items = {key: map_tensors(function, value) for key, value in data.items()}
        return items if type(data) is dict else type(data)(items)
    if isinstance(data, (list, tuple)):
        values = [function(v) if isinstance(v, Tensor) else map_tensors(function, v) for v in data]
        return type(data)(*values) if hasattr(data, "_fields") else type(data)(values)
    if is_dataclass(data) and not isinstance(data, type):
        return replace(data, **{f.name: map_tensors(function, getattr(data, f.name)) for f in fields(data) if f.init})
    return data


def tensors_in(data: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested mappings, sequences and dataclasses, in order."""
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from tensors_in(value)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from tensors_in(value)
    elif is_dataclass(data) and not isinstance(data, type):
        for f in fields(data):
            yield from tensors_in(getattr(data, f.name))
