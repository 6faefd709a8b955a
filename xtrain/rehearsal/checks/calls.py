"""What the user's lines compute in a training step, line by line, so that two trainings can be compared by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from xtrain.rehearsal.places import Place, direct_place

_ROWS, _COLUMNS = 1024, 32  # of a result are kept at most
_AHEAD = 40  # calls that are looked through for a line that only one of two trainings has


class Call(NamedTuple):
    """A function of torch that a line of the user's called in a step, and numbers of its result.

    `shape` is that of the whole result.
    """

    step: int
    place: Place
    name: str
    shape: tuple[int, ...]
    values: Tensor


class Parting(NamedTuple):
    """The first line that computed something else, and in which way: one of the constants below."""

    place: Place
    way: str
    name: str


OTHER_LINES, SUMS, PAIRS, STATISTIC, NUMBERS = "other lines", "sums", "pairs", "statistic", "numbers"


class Calls(TorchFunctionMode):
    """Notes the calls of steps.

    Attributes:
        seen: in order.
        step: that runs; 0 outside of steps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Call] = []
        self.step = 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if self.step and isinstance(result, Tensor) and result.is_floating_point() and not _is_wrapped(result):
            place, name = direct_place(__file__), getattr(function, "__name__", "")
            if place.line and name != "__get__":
                with torch.no_grad():
                    self.seen.append(Call(self.step, place, name, tuple(result.shape), _sketch(result.detach())))
        return result


def _is_wrapped(tensor: Tensor) -> bool:
    """Return whether it is one of torch.func, which has no numbers outside of it."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def _sketch(tensor: Tensor) -> Tensor:
    """Return some columns of its first rows; halves of a batch have halves of them."""
    if tensor.layout is not torch.strided or not tensor.dim() or not tensor.numel():
        return tensor.to("cpu", torch.float32, copy=True)
    flat = tensor.reshape(tensor.shape[0], -1)
    step = max(1, flat.shape[1] // _COLUMNS)
    return flat[:_ROWS, ::step].to("cpu", torch.float32, copy=True)


def first_parting(whole: Sequence[Call], parts: Sequence[Sequence[Call]], tolerance: float) -> Parting | None:
    """Return the first line with another result.

    Args:
        whole: of the training that the others should agree with.
        parts: of one other training; or of two, which have the two halves of each batch.
        tolerance: relative, of the norm of a result.
    """
    for index, call in enumerate(whole):
        found = [part[index] if index < len(part) else None for part in parts]
        for part, other in zip(parts, found, strict=True):
            if other is None or (other.place, other.name) != (call.place, call.name):
                return Parting(_extra_line(whole, part, index), OTHER_LINES, call.name)
        way = _way(call, [other for other in found if other is not None], tolerance)
        if way:
            return Parting(call.place, way, call.name)
    return next((Parting(p[len(whole)].place, OTHER_LINES, "") for p in parts if len(p) > len(whole)), None)


def _extra_line(whole: Sequence[Call], part: Sequence[Call], index: int) -> Place:
    """Return the line that only one of the two has: of the whole if the part goes on with what comes after it."""
    if index >= len(part):
        return whole[index].place
    later = {call.place for call in whole[index + 1 : index + _AHEAD]}
    return whole[index].place if part[index].place in later else part[index].place


def _way(call: Call, parts: list[Call], tolerance: float) -> str:
    """Return in which way the results of `parts` are not those of `call`; empty if they are."""
    if len(parts) == 1:
        same = parts[0].shape == call.shape and _close(call.values, parts[0].values, tolerance)
        return "" if same else NUMBERS
    one, other = parts
    if one.shape != other.shape:
        return STATISTIC
    if one.shape == call.shape:
        mean = (one.values + other.values) / 2
        alike = _close(call.values, one.values, tolerance) and _close(call.values, other.values, tolerance)
        if alike or _close(call.values, mean, tolerance):
            return ""
        return SUMS if _close(call.values, 2 * mean, tolerance) else STATISTIC
    if len(call.shape) != len(one.shape) or call.shape != (2 * one.shape[0], *one.shape[1:]):
        return PAIRS
    if call.shape[0] > _ROWS:
        return "" if _close(call.values[: len(one.values)], one.values[: len(call.values)], tolerance) else STATISTIC
    return "" if _close(call.values, torch.cat([one.values, other.values]), tolerance) else STATISTIC


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    one, other = (t.to_dense() if t.layout is not torch.strided else t for t in (one, other))
    difference, size = float((one - other).norm()), float(one.norm())
    if not math.isfinite(difference):
        return bool(torch.equal(one.isfinite(), other.isfinite()))
    return difference <= tolerance * size + 1e-30
