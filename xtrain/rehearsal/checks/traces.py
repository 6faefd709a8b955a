"""What a training computes, operation by operation, as digests that two trainings can be compared by."""

from __future__ import annotations

import ctypes
import zlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xtrain.callbacks.base import Callback
from xtrain.rehearsal.places import NOWHERE, Place, current_place

_UNWRITTEN = ("empty", "new_empty")  # their numbers are those of whatever was there before
BEFORE = "before the first step"


class Operation(NamedTuple):
    """An operation, or a batch that comes: the step that it is inside of, or 0; the user's line; a digest."""

    step: int
    place: Place
    is_batch: bool
    digest: int


class Update(NamedTuple):
    """The parameters, by name, as digests, after `optimizer` has stepped in `step`."""

    step: int
    optimizer: str
    parameters: dict[str, int]


@dataclass
class Record:
    """A training.

    Attributes:
        operations: in order.
        updates: in order, the parameters as they were made first.
        batches: of an epoch; infinite if nobody knows.
        refused: why the checkpoint could not be saved, or gone on from; empty if it could.
    """

    operations: list[Operation] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    batches: float = float("inf")
    refused: str = ""

    def after(self, step: int) -> Record:
        """Return the part that is inside of later steps."""
        operations = [operation for operation in self.operations if operation.step > step]
        return Record(operations, [update for update in self.updates if update.step > step])


class Difference(NamedTuple):
    """Where two trainings part: step, optimizer, parameter; the line, and whether a batch is what differs first."""

    step: int
    optimizer: str
    parameter: str
    place: Place
    in_batch: bool


def first_difference(one: Record, other: Record) -> Difference | None:
    """Return where the parameters of two trainings part, with the first operation that did; None if they are equal."""
    for first, second in zip(one.updates, other.updates, strict=False):
        differing = [name for name, value in first.parameters.items() if second.parameters.get(name) != value]
        if differing or first[:2] != second[:2]:
            name = differing[0] if differing else ""
            return Difference(first.step, first.optimizer, name, *_first_operation(one, other))
    if len(one.updates) == len(other.updates):
        return None
    longer = max(one.updates, other.updates, key=len)
    update = longer[min(len(one.updates), len(other.updates))]
    return Difference(update.step, update.optimizer, "", *_first_operation(one, other))


def _first_operation(one: Record, other: Record) -> tuple[Place, bool]:
    for first, second in zip(one.operations, other.operations, strict=False):
        if first != second:
            return first.place, first.is_batch
    return NOWHERE, False


class Tracer(Callback):
    """Makes the `Record` of a training, while `operations` is on.

    Args:
        begins: how many steps were trained before.
    """

    def __init__(self, begins: int = 0) -> None:
        self.record = Record()
        self.operations = _Operations(self)
        self._step, self._inside = begins, False

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Keep the parameters as they were made, and watch the optimizers."""
        self.record.batches = trainer.num_training_batches
        self.record.updates.append(Update(0, BEFORE, _parameters(module)))
        for wrapped in trainer.life.optimizers:
            name = repr(wrapped)
            wrapped.optimizer.register_step_post_hook(lambda *_, name=name: self._stepped(name, module))

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Begin a step, and note its batch."""
        self._step, self._inside = self._step + 1, True
        self.note(NOWHERE, batch, True)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End a step."""
        self._inside = False

    def note(self, place: Place, values: Any, is_batch: bool = False) -> None:
        """Add an operation with these results."""
        step = self._step if self._inside else 0
        self.record.operations.append(Operation(step, place, is_batch, _digest(values)))

    def _stepped(self, name: str, module: nn.Module) -> None:
        self.record.updates.append(Update(self._step, name, _parameters(module)))


class _Operations(TorchDispatchMode):
    """Notes every operation that makes numbers."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracer = tracer

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view and not function._schema.name.rpartition("::")[2].startswith(_UNWRITTEN):
            self._tracer.note(current_place(), result)
        return result


# ---------------------------------------------------------------- digests


def _parameters(module: nn.Module) -> dict[str, int]:
    return {name: _digest(parameter) for name, parameter in module.named_parameters()}


def _digest(values: Any) -> int:
    """Return a number that differs where a bit of a tensor or number in `values` does."""
    found = 0
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            found = _digest_of_tensor(leaf, found)
        elif isinstance(leaf, bool | int | float | complex | str):
            found = zlib.crc32(repr(leaf).encode(), found)
    return found


def _digest_of_tensor(tensor: Tensor, found: int) -> int:
    found = zlib.crc32(repr((tuple(tensor.shape), tensor.dtype)).encode(), found)
    if tensor.layout is not torch.strided or tensor.is_quantized or not tensor.numel():
        return found  # the values of a sparse one are parts of the operations that made it
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return zlib.crc32((ctypes.c_char * dense.nbytes).from_address(dense.data_ptr()), found)
