"""Where DeepSpeed puts things: the user's groups before it flattens them, and pieces of parameters in its shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Group:
    """One group of an optimizer as the user made it.

    Attributes:
        group: the group itself.
        names: of its parameters, in order.
        trained: those that require gradients; DeepSpeed drops a group without any.
    """

    group: dict[str, Any]
    names: Sequence[str]
    trained: Sequence[str]


@dataclass(frozen=True)
class Piece:
    """Where some consecutive numbers of a parameter lie on one rank.

    Attributes:
        name: of the parameter.
        shard: number of the flat shard.
        at: where they begin in the shard.
        start: where they begin in the flattened parameter.
        count: how many.
    """

    name: str
    shard: int
    at: int
    start: int
    count: int


def read_groups(groups: Sequence[dict[str, Any]], names: Mapping[Tensor, str]) -> list[Group]:
    """Return `groups` as they are before an engine is made.

    Args:
        groups: of a torch optimizer.
        names: of the parameters.
    """
    return [
        Group(group, [names[p] for p in group["params"]], [names[p] for p in group["params"] if p.requires_grad])
        for group in groups
    ]
