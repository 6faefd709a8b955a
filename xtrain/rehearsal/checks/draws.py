"""Random numbers of a training, written down, and given to another: on any device, or by halves to two processes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xtrain.rehearsal.places import Place, current_place, shown

_DROPOUT = torch.ops.aten.native_dropout


class Draw(NamedTuple):
    """What an operation drew: its name, its numbers as arguments (a probability, a bound), its result, the line."""

    kind: str
    arguments: tuple[float, ...]
    values: Tensor
    place: Place


class Draws(TorchDispatchMode):
    """Writes down what is drawn in training steps; or, given `source`, returns that in place of new numbers.

    Args:
        source: of another training, to be repeated.
        part: which of the two halves of a batch this training has; None: all of it.

    Attributes:
        seen: what was drawn.
        inside: whether a training step runs; set from outside.
        parted: why numbers are not those of `source`, from the first draw on for which that is so; else empty.
    """

    def __init__(self, source: Sequence[Draw] | None = None, part: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Draw] = []
        self.inside, self.parted = False, ""
        self._source, self._part, self._next = source, part, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if self.inside and not self.parted and _is_random(function):
            return self._drawn(function, args, _numbers(function, args, kwargs or {}), result)
        return result

    def _drawn(self, function: Any, args: tuple[Any, ...], numbers: tuple[float, ...], result: Any) -> Any:
        kind, place = function._schema.name.rpartition("::")[2].rstrip("_"), current_place()
        is_dropout = function._overloadpacket is _DROPOUT
        values = result[1] if is_dropout else result
        if not isinstance(values, Tensor):
            self.parted = f"{kind} at {_said(place)} draws in a way that cannot be repeated elsewhere"
            return result
        if self._source is None:
            self.seen.append(Draw(kind, numbers, values.detach().to("cpu", copy=True), place))
            return result
        wanted = self._wanted(kind, numbers, values)
        if wanted is None:
            self.parted = f"it draws other random numbers at {_said(place)}"
            return result
        if is_dropout:
            return args[0] * wanted * (1.0 / (1.0 - args[1])), wanted
        return values.copy_(wanted) if _is_in_place(function) else wanted

    def _wanted(self, kind: str, numbers: tuple[float, ...], values: Tensor) -> Tensor | None:
        """Return what the source drew here, or this part of it; None if it drew something else."""
        assert self._source is not None
        if self._next >= len(self._source):
            return None
        draw = self._source[self._next]
        self._next += 1
        drawn, shape = draw.values, values.shape
        if (draw.kind, draw.arguments) != (kind, numbers):
            return None
        if drawn.shape != shape:
            halved = self._part is not None and drawn.dim() and drawn.shape == (2 * shape[0], *shape[1:])
            if not halved:
                return None
            drawn = drawn[: shape[0]] if self._part == 0 else drawn[shape[0] :]
        return drawn.to(values.device, values.dtype)


@cache
def _is_random(function: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in function.tags


def _numbers(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, ...]:
    """Return the numbers among the arguments, those by default, too: which are left out depends on the device."""
    schema = function._schema.arguments
    given = [*args, *(kwargs.get(a.name, a.default_value) for a in schema[len(args) :])]
    return tuple(float(a) for a in given if isinstance(a, int | float) and not isinstance(a, bool))


def _is_in_place(function: Any) -> bool:
    return bool(function._schema.is_mutable)


def _said(place: Place) -> str:
    return f"{shown(place.file)}:{place.line}" if place.file else "a line that is not yours"
