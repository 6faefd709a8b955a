"""A batch as a list of tensors, and what else a step may decide from."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_PLAIN = (bool, int, float, str, bytes, type(None))


class UnknownPartError(TypeError):
    """A batch holds an object of which nobody knows when it is the same as another one."""


def take_apart(batch: Any, tensors: list[Tensor]) -> Any:
    """Append the tensors of `batch` to `tensors`.

    Returns:
        What two batches have in common that the same replay is right for: structure, shapes, dtypes, plain values.

    Raises:
        UnknownPartError: for an object that is no tensor, container or plain value.
    """
    if isinstance(batch, Tensor):
        tensors.append(batch)
        return batch.shape, batch.stride(), batch.dtype, batch.device, batch.requires_grad
    kind = type(batch)
    if kind is tuple or kind is list:
        return kind, *[take_apart(item, tensors) for item in batch]
    if isinstance(batch, dict):
        return kind, *[(key, take_apart(value, tensors)) for key, value in batch.items()]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return kind, *[take_apart(item, tensors) for item in batch]
    if isinstance(batch, _PLAIN):
        return kind, batch
    raise UnknownPartError(kind.__name__)
