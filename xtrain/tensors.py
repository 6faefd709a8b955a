"""Walks over the tensors of nested data, and the move of a module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from xtrain.errors import ConfigurationError, explain

_MISSING = object()


def map_tensors(function: Callable[[Tensor], Any], data: Any, objects: Callable[[Any], Any] | None = None) -> Any:
    """Return `data` with `function` applied to each tensor in nested mappings, sequences and dataclasses.

    Containers keep their type and what else they hold: a copy gets the new items, no ``__init__`` runs.

    Args:
        function: what becomes of a tensor.
        data: anything; what is no container is returned as it is.
        objects: what becomes of an object with a method ``to`` that is no tensor; None looks inside if it is a
            container, and leaves it otherwise.

    Raises:
        ConfigurationError: for a container that cannot be copied.
    """
    if isinstance(data, Tensor):
        return function(data)
    kind = type(data)
    if kind is dict:
        return {key: map_tensors(function, value, objects) for key, value in data.items()}
    if kind is list or kind is tuple:
        return kind(function(v) if isinstance(v, Tensor) else map_tensors(function, v, objects) for v in data)
    if isinstance(data, PackedSequence):  # the sizes of its batches stay on the CPU
        parts = ("data", "sorted_indices", "unsorted_indices")
        return data._replace(**{name: map_tensors(function, getattr(data, name), objects) for name in parts})
    if objects is not None and movable(data):
        return objects(data)
    items = _items(data)
    if items is None:
        return data
    return _rebuilt(data, items, lambda value: map_tensors(function, value, objects))


def tensors_in(data: Any, objects: bool = True) -> Iterator[Tensor]:
    """Yield the tensors that `map_tensors` reaches in `data`, in its order.

    Args:
        data: anything.
        objects: whether to look into containers with a method ``to``, as `map_tensors` does without `objects`.
    """
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, PackedSequence):
        yield from tensors_in((data.data, data.sorted_indices, data.unsorted_indices))
    elif objects or not movable(data):
        for _, value in _items(data) or ():
            yield from tensors_in(value, objects)


def movable(data: Any) -> bool:
    """Return whether `data` is no tensor, but an object with a method ``to``, as libraries of graphs or text make."""
    return callable(getattr(type(data), "to", None)) and not isinstance(data, Tensor | PackedSequence)


def moved(data: Any, device: torch.device) -> Any:
    """Return the object `data`, which is `movable`, on `device`.

    Raises:
        ConfigurationError: if its ``to`` takes no device.
    """
    try:
        result = data.to(device)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        kind = type(data).__name__
        received = f"{type(error).__name__}: {error}"
        raise ConfigurationError(explain(f"{kind}.to(device) to move a {kind} of a batch", received, _HOOK)) from error
    return data if result is None else result


def move_module(module: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Move `module` to `device`, its real floating-point tensors in `dtype`; complex ones stay complex.

    Raises:
        ConfigurationError: for a tensor without data, on the meta device.
    """
    named = [*module.named_parameters(), *module.named_buffers()]
    meta = next((name for name, tensor in named if tensor.is_meta and device.type != "meta"), None)
    if meta is not None:
        fix = f"module.to_empty(device={device.type!r}) and an initialisation before the run"
        raise ConfigurationError(explain("a module whose tensors have data", f"{meta} on the meta device", fix))
    module.to(device)
    if dtype is not None:
        module._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def _items(data: Any) -> Iterable[tuple[Any, Any]] | None:
    """Return what a container holds, by key, position or attribute; None for anything else."""
    if isinstance(data, Mapping):
        return list(data.items())
    if isinstance(data, Sequence) and not isinstance(data, str | bytes | bytearray | range | memoryview):
        return enumerate(data)
    if is_dataclass(data) and not isinstance(data, type):
        names = dict.fromkeys([*(f.name for f in fields(data)), *getattr(data, "__dict__", ())])
        found = ((name, getattr(data, name, _MISSING)) for name in names)
        return [(name, value) for name, value in found if value is not _MISSING]
    return None


def _rebuilt(data: Any, items: Iterable[tuple[Any, Any]], function: Callable[[Any], Any]) -> Any:
    """Return a copy of the container `data` with `function` applied to what it holds."""
    before = list(items)
    items = [(key, function(value)) for key, value in before]
    fixed = isinstance(data, Mapping | Sequence) and not isinstance(data, MutableMapping | MutableSequence)
    if fixed and all(new is old for (_, new), (_, old) in zip(items, before, strict=True)):
        return data
    try:
        if isinstance(data, tuple):
            return _rebuilt_tuple(data, [value for _, value in items])
        if fixed:
            values: Any = dict(items) if isinstance(data, Mapping) else [value for _, value in items]
            return type(data)(values)
        new = copy.copy(data)
        for key, value in items:
            if isinstance(data, MutableMapping | MutableSequence):
                new[key] = value
            else:  # a dataclass, also a frozen one
                object.__setattr__(new, key, value)
    except Exception as error:
        kind = type(data).__name__
        received = f"{type(error).__name__}: {error}"
        raise ConfigurationError(explain(f"a {kind} that can be copied with new items", received, _HOOK)) from error
    return new


def _rebuilt_tuple(data: Any, values: list[Any]) -> Any:
    if hasattr(data, "_make"):
        new = data._make(values)
    elif hasattr(data, "n_fields"):  # what torch.max(x, dim=0) returns
        return type(data)(values)
    else:
        new = tuple.__new__(type(data), values)
    for name, value in getattr(data, "__dict__", {}).items():
        setattr(new, name, value)
    return new


_HOOK = "def transfer_batch_to_device(self, batch, device, dataloader_idx): ...; return batch"
