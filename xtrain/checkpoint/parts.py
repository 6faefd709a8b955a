"""Tensors that lie in parts on several ranks: each rank writes its own, and a reader puts together what it asks for.

In the files of a checkpoint a reference stands where such a tensor belongs: a dict with a key of the parts, shape and
dtype. Each rank's parts are in its ``shard-00000.pt``: by that key, the place of the first number and the numbers.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xtrain.errors import CheckpointError, explain

PREFIX = "shard-"
_KEY = "in parts"


@dataclass(frozen=True, eq=False)
class Part:
    """Consecutive numbers of a flattened tensor, which lie on this rank.

    Attributes:
        numbers: one dimension; none if this rank has no part of it.
        start: where they begin in the flattened tensor.
        shape: of the whole tensor.
    """

    numbers: Tensor
    start: int
    shape: tuple[int, ...]

    def numel(self) -> int:
        """Return how many numbers the whole tensor has."""
        return torch.Size(self.shape).numel()


class Splitter:
    """Takes the parts out of what is written.

    Attributes:
        shard: what this rank writes of its own, by key.
    """

    def __init__(self) -> None:
        self.shard: dict[str, tuple[int, Tensor]] = {}
        self._keys: dict[int, str] = {}  # tied weights are one part

    def split(self, content: Any, place: str) -> Any:
        """Return `content` with references in place of its parts.

        Args:
            content: of one file; the same structure on every rank.
            place: the name of the file.
        """
        if isinstance(content, Part):
            key = self._keys.setdefault(id(content.numbers), place)
            self.shard[key] = content.start, content.numbers
            return {_KEY: key, "shape": tuple(content.shape), "dtype": content.numbers.dtype}
        if isinstance(content, dict):
            items = {key: self.split(value, f"{place}/{key}") for key, value in content.items()}
            return items if any(items[key] is not value for key, value in content.items()) else content
        if type(content) in (list, tuple):
            values = [self.split(value, f"{place}/{i}") for i, value in enumerate(content)]
            return type(content)(values) if any(a is not b for a, b in zip(values, content, strict=True)) else content
        return content


class Assembler:
    """Puts tensors together from the parts of all ranks that wrote them.

    Args:
        shards: the contents of their files; tensors in them may lie in the files still.
    """

    def __init__(self, shards: Mapping[str, Mapping[str, tuple[int, Tensor]]]) -> None:
        self._shards = shards

    def __call__(self, value: Any) -> Any:
        """Return `value` with whole tensors for references; those in a dict are put together when they are asked for.

        Raises:
            CheckpointError: if parts are missing.
        """
        if isinstance(value, dict):
            return self._tensor(value) if _KEY in value else self.dict(value)
        if type(value) in (list, tuple):
            return type(value)(map(self, value))
        return value

    def dict(self, content: dict[Any, Any]) -> Any:
        """Return a dict as above; `content` itself if no rank wrote parts."""
        return Assembled(content, self) if self._shards else content

    def _tensor(self, reference: Mapping[str, Any]) -> Tensor:
        key, shape = reference[_KEY], torch.Size(reference["shape"])
        parts = [shard[key] for shard in self._shards.values() if key in shard]
        if sum(part.numel() for _, part in parts) != shape.numel():
            received = f"{sum(part.numel() for _, part in parts)} of them in {sorted(self._shards)}"
            fix = "another checkpoint: trainer.fit(model, ckpt_path='...')"
            raise CheckpointError(explain(f"{shape.numel()} numbers of {key}", received, fix))
        whole = torch.empty(shape.numel(), dtype=reference["dtype"])
        for start, part in parts:
            whole[start : start + part.numel()] = part
        return whole.view(shape)


class Assembled(UserDict[Any, Any]):
    """A dict whose tensors are put together when they are asked for, and not kept."""

    def __init__(self, content: Mapping[Any, Any], assemble: Assembler) -> None:
        super().__init__()
        self.data, self._assemble = dict(content), assemble

    def __getitem__(self, key: Any) -> Any:
        return self._assemble(self.data[key])
