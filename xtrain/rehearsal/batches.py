"""``--batch "64x3x32x32,64:int"``: random batches of these shapes."""

from __future__ import annotations

import re
from typing import Any

import torch

from xtrain.errors import ConfigurationError, explain

_PART = re.compile(r"(?:(?P<name>\w+)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<kind>float|int|bool)(?P<below>\d+)?)?")


def make_batches(spec: str, count: int) -> list[Any]:
    """Return `count` batches; a tensor for one part, a tuple for several, a dict for parts with names.

    Args:
        spec: sizes with ``x`` between them; ``:int`` gives 0 and 1, ``:int10`` numbers below 10, ``:bool`` truth
            values, and normal numbers otherwise; ``x=64x3,y=64:int`` makes a dict; ``none`` makes None.
        count: how many.

    Raises:
        ConfigurationError: for anything else.
    """
    if spec.strip().lower() == "none":
        return [None] * count
    found = [_PART.fullmatch(part.strip()) for part in spec.split(",")]
    parts = [match.groupdict() for match in found if match is not None]
    if len(parts) < len(found) or len({part["name"] is None for part in parts}) != 1:
        fix = '--batch "64x3x32x32,64:int"'
        raise ConfigurationError(explain("a batch as sizes with x between them", repr(spec), fix))
    generator = torch.Generator().manual_seed(0)
    return [_batch(parts, generator) for _ in range(count)]


def _batch(parts: list[dict[str, Any]], generator: torch.Generator) -> Any:
    tensors = [_tensor(part, generator) for part in parts]
    if parts[0]["name"] is not None:
        return dict(zip((part["name"] for part in parts), tensors, strict=True))
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def _tensor(part: dict[str, Any], generator: torch.Generator) -> torch.Tensor:
    shape = [int(size) for size in part["shape"].split("x")]
    if part["kind"] in ("int", "bool"):
        numbers = torch.randint(0, int(part["below"] or 2), shape, generator=generator)
        return numbers.bool() if part["kind"] == "bool" else numbers
    return torch.randn(shape, generator=generator)
