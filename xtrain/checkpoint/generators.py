"""The random generators of a process as tensors and plain values."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch


def read_generators() -> dict[str, Any]:
    """Return the states of Python's, torch's and (if it is imported) NumPy's global generators, as they give them."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state["numpy"] = numpy.random.get_state()
    return state


def plain_generators(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `read_generators` returned as tensors and plain values, which a file may hold."""
    plain = dict(state)
    if "numpy" in plain:
        kind, keys, place, has_gauss, cached = plain["numpy"]
        keys = torch.tensor([int(key) for key in keys], dtype=torch.int64)
        plain["numpy"] = (str(kind), keys, int(place), int(has_gauss), float(cached))
    return plain


def restore_generators(state: Mapping[str, Any], but: frozenset[str] = frozenset()) -> None:
    """Set the generators to what `plain_generators` returned.

    Args:
        state: as it was returned, or read from a file.
        but: those to leave alone: ``"python"``, ``"torch"``, ``"numpy"``.
    """
    if "python" not in but:
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
    if "torch" not in but:
        torch.set_rng_state(state["torch"])
    if "numpy" in state and "numpy" not in but:
        import numpy

        kind, keys, place, has_gauss, cached = state["numpy"]
        numpy.random.set_state((kind, keys.numpy().astype("uint32"), place, has_gauss, cached))
