"""SPMD: one program over a mesh of devices, written as for one device and split by the compiler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from xtrain.errors import ConfigurationError, explain
from xtrain.tensors import tensors_in

from .batches import row_count
from .runtime import Runtime

AXES = ("data", "fsdp")


def check_axes(axes: Mapping[str, int] | None) -> dict[str, int] | None:
    """Return `axes` as a dict.

    Raises:
        ConfigurationError: unless it maps ``"data"`` and/or ``"fsdp"`` to positive ints.
    """
    if axes is None:
        return None
    valid = isinstance(axes, Mapping) and axes and set(axes) <= set(AXES)
    if not valid or not all(type(n) is int and n > 0 for n in axes.values()):
        expected = (
            "a mesh out of 'data' (batches are split) and 'fsdp' (batches and parameters are), with positive sizes"
        )
        raise ConfigurationError(explain(expected, axes, "backend_options={'mesh': {'data': 2, 'fsdp': 2}}"))
    return dict(axes)


class Mesh:
    """All devices of all hosts, arranged.

    Args:
        axes: sizes by name, see `check_axes`.
        runtime: started with SPMD.

    Raises:
        ConfigurationError: if the sizes do not multiply to the number of devices.
    """

    def __init__(self, axes: dict[str, int], runtime: Runtime) -> None:
        count, wanted = runtime.xr.global_runtime_device_count(), math.prod(axes.values())
        if count != wanted:
            received = f"{axes}, which needs {wanted}"
            raise ConfigurationError(
                explain(
                    f"a mesh of the {count} devices there are",
                    received,
                    f"backend_options={{'mesh': {{'data': {count}}}}}",
                )
            )
        self._runtime, self._axes, self._ways = runtime, axes, wanted
        self._mesh = runtime.mesh(tuple(axes.values()), tuple(axes))
        self._rows: int | None = None

    def of_state(self, tensor: Tensor) -> Any:
        """Return how a parameter, a buffer or its optimizer state is split: along its longest dimension that fits."""
        split = self._dimension(tensor)
        return self._runtime.sharding(self._mesh, tuple("fsdp" if d == split else None for d in range(tensor.dim())))

    def held(self, tensor: Tensor) -> int:
        """Return how many numbers of such a tensor each device holds."""
        return tensor.numel() // (1 if self._dimension(tensor) is None else self._axes["fsdp"])

    def _dimension(self, tensor: Tensor) -> int | None:
        ways = self._axes.get("fsdp", 1)
        fitting = [d for d in range(tensor.dim()) if ways > 1 and tensor.size(d) % ways == 0 and tensor.size(d) > 0]
        return max(fitting, key=tensor.size, default=None)

    def of_batch(self, batch: Any) -> list[Any]:
        """Return how the tensors of `batch` are split: those that have its rows by rows, over all axes.

        Raises:
            ConfigurationError: if there is nothing to split, or the rows do not divide. A batch smaller
                than the first one, as the last one may be, is split unevenly.
        """
        tensors = list(tensors_in(batch, objects=False))
        rows = row_count(tensors)
        if rows is None:
            received = f"{type(batch).__name__} without any"
            fix = "a collate_fn that returns tensors"
            raise ConfigurationError(explain("a batch of tensors, which a mesh can split by rows", received, fix))
        self._rows = self._rows or rows
        if rows % self._ways and rows >= self._rows:
            fix = f"DataLoader(dataset, batch_size={-(-rows // self._ways) * self._ways})"
            raise ConfigurationError(explain(f"a batch size that the mesh {self._axes} divides", rows, fix))
        names = tuple(self._axes)
        return [
            self._runtime.sharding(
                self._mesh,
                (names, *[None] * (t.dim() - 1)) if t.dim() and t.size(0) == rows else (None,) * t.dim(),
                part_of_global=True,
            )
            for t in tensors
        ]
