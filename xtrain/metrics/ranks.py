"""Logged values reduced over the ranks: matched by name and reduction, never by the order in which they came."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from xtrain.collectives import Collectives
from xtrain.errors import ProtocolError, explain

# A reduction as the part of two sums or of one maximum: all metrics travel in two vectors.
_SUMS = ("mean", "sum")


@dataclass(frozen=True)
class Value:
    """What one rank has of a metric: `op` is how it is reduced, `weight` counts in a mean only."""

    op: str
    value: float
    weight: float


def reduce_over_ranks(
    values: Mapping[str, Value], ranks: Collectives, what: str, excused: bool = False
) -> dict[str, float]:
    """Return the values reduced over the ranks, by name.

    Args:
        values: of this rank, by name.
        ranks: the processes of the run.
        what: names the occasion, the same on all ranks.
        excused: this rank had no batch to log anything for, so names may be missing.

    Raises:
        ProtocolError: on every rank, if only some of them logged a name, or with different reductions.
    """
    names = match_names({name: value.op for name, value in values.items()}, ranks, what, excused)
    return combine(names, values, ranks)


def match_names(own: Mapping[str, str], ranks: Collectives, what: str, excused: bool = False) -> dict[str, str]:
    """Return the names that the ranks have logged, sorted, with how they are reduced; arguments as before."""
    lines = sorted(f"{name}\0{op}" for name, op in own.items())
    digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=16).digest()
    note = f" [{', '.join(sorted(own))}]" if own else ""
    if len(set(ranks.meet(f"reduce what was logged {what}", digest, note))) == 1:
        return dict(sorted(own.items()))
    everyone = ranks.gather_json([excused, dict(own)], "tell which metrics were logged")
    found: dict[str, str] = {}
    for rank, (_, theirs) in enumerate(everyone):
        for name, op in theirs.items():
            if found.setdefault(name, op) != op:
                raise _unlike(f"one reduction of {name!r}", f"reduce_fx={op!r} on rank {rank}, {found[name]!r} before")
    for name in found:
        without = [str(r) for r, (free, theirs) in enumerate(everyone) if name not in theirs and not free]
        if without:
            having = [str(r) for r, (_, theirs) in enumerate(everyone) if name in theirs]
            received = f"{name!r} from rank {', '.join(having)}, not from rank {', '.join(without)}"
            raise _unlike(f"every rank to log what is reduced over them ({what})", received)
    return dict(sorted(found.items()))


def _unlike(expected: str, received: str) -> ProtocolError:
    fix = "self.log(name, value, sync_dist=True) on every rank, or rank_zero_only=True for what only rank 0 logs"
    return ProtocolError(explain(expected, received, fix))


def combine(names: Mapping[str, str], values: Mapping[str, Value], ranks: Collectives) -> dict[str, float]:
    """Return the values reduced over the ranks: two messages at most.

    Args:
        names: the same on every rank, with how each is reduced.
        values: of this rank; what is missing counts nothing.
        ranks: the processes of the run, which have met.
    """
    added = [name for name, op in names.items() if op in _SUMS]
    largest = [name for name, op in names.items() if op not in _SUMS]
    absent = Value("", 0.0, 0.0)
    held = [values.get(name, absent) for name in added]
    factors = [v.weight if v.op == "mean" else 1.0 for v in held]
    sums = [v.value * factor if factor else 0.0 for v, factor in zip(held, factors, strict=True)]
    totals = _together(sums + factors, ranks, "sum") if added else []
    result: dict[str, float] = {}
    for name, total, weight in zip(added, totals, totals[len(added) :], strict=False):
        result[name] = (total / weight if weight else math.nan) if names[name] == "mean" else total
    signs = [-1.0 if names[name] == "min" else 1.0 for name in largest]
    local = [s * values[n].value if n in values else -math.inf for n, s in zip(largest, signs, strict=True)]
    for name, sign, value in zip(largest, signs, _together(local, ranks, "max") if largest else [], strict=True):
        result[name] = sign * value
    return result


def _together(numbers: Sequence[float], ranks: Collectives, op: str) -> list[float]:
    row = torch.tensor(numbers, dtype=torch.float64)
    reduced: list[float] = ranks.all_reduce(row, "sum" if op == "sum" else "max", met=True).tolist()
    return reduced
