"""What training steps trace, operation by operation, and why the graph of one is not that of another."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from xtrain.callbacks.base import Callback
from xtrain.rehearsal.places import NOWHERE, Place, current_place, direct_place, is_users

from . import watch
from .batches import Signature, signature
from .runtime import Counts, Runtime

_WATCHERS = (__file__, watch.__file__)
_NOTHING = Counts(0, 0, 0)


class Shape(NamedTuple):
    """What a tensor is to a graph."""

    sizes: tuple[int, ...]
    dtype: torch.dtype


class Operation(NamedTuple):
    """An operation as it was traced.

    Attributes:
        function: of torch.
        place: the user's line; nowhere in a backward, and inside of xtrain and of optimizers.
        leaves: of its arguments, tensors as shapes.
        tree: of its arguments.
        made: the shapes of its results.
    """

    function: Any
    place: Place
    leaves: tuple[Any, ...]
    tree: Any
    made: tuple[Shape, ...]

    @property
    def kind(self) -> tuple[Any, Place]:
        """What does not depend on numbers and shapes."""
        return self.function, self.place

    @property
    def shapes(self) -> tuple[Any, ...]:
        """Of arguments and results."""
        return (*(leaf for leaf in self.leaves if isinstance(leaf, Shape)), *self.made)

    @property
    def numbers(self) -> tuple[float, ...]:
        """That are arguments."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, bool | int | float))


class Read(NamedTuple):
    """The host read from the device: where, by which operation that XLA lacks, if any, and whether xtrain did it."""

    place: Place
    operation: str
    direct: bool


@dataclass
class TracedStep:
    """A training step.

    Attributes:
        batch: its shapes.
        operations: in order.
        reads: how often for each.
        counts: what it added to what torch_xla counts.
    """

    batch: Signature
    operations: list[Operation] = field(default_factory=list)
    reads: Counter[Read] = field(default_factory=Counter)
    counts: Counts = field(default=_NOTHING)

    @property
    def users(self) -> list[Operation]:
        """The operations of the user's lines."""
        return [operation for operation in self.operations if operation.place.line]


class TooSlowError(BaseException):
    """The time is over, in the middle of a step; no ``except Exception`` of the user sees it."""


class Watch(Callback):
    """Notes what each training step traces, while `operations` and `functions` are on.

    Args:
        enough: seconds after which no further step begins.
        most: seconds after which a step is given up.

    Attributes:
        steps: so far.
        ended_early: whether the time has ended the training.
    """

    def __init__(self, enough: float, most: float) -> None:
        self.steps: list[TracedStep] = []
        self.operations, self.functions = _Operations(self), _Functions(self)
        self._began, self._enough, self._most = time.monotonic(), enough, most
        self.ended_early = False
        self._before: Counts | None = None
        self._reads, self._fallbacks = 0, Counter[str]()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Begin a step."""
        self._before = Runtime.counts()
        self._reads, self._fallbacks = self._before.reads, Counter(Runtime.fallbacks())
        self.steps.append(TracedStep(signature(batch)))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End a step."""
        assert self._before is not None
        self.settle()
        now = Runtime.counts()
        self.steps[-1].counts = Counts(*(a - b for a, b in zip(now, self._before, strict=True)))
        self._before = None
        if time.monotonic() - self._began > self._enough:
            trainer.should_stop = self.ended_early = True

    @property
    def watching(self) -> bool:
        """Whether a training step goes on."""
        return self._before is not None

    def traced(self, operation: Operation) -> None:
        """Add an operation."""
        self.steps[-1].operations.append(operation)
        self.settle()
        if time.monotonic() - self._began > self._most:
            raise TooSlowError

    def settle(self) -> None:
        """Note where the reads since the last call were."""
        reads = Runtime.reads()
        if reads == self._reads:
            return
        fallbacks = Counter(Runtime.fallbacks())
        new, count = [*(fallbacks - self._fallbacks)], reads - self._reads
        self._reads, self._fallbacks = reads, fallbacks
        direct = _line()
        place = direct if direct.line else current_place()
        for name in new or [""]:
            self.steps[-1].reads[Read(place, name, bool(direct.line))] += max(1, count // max(1, len(new)))


class _Operations(TorchDispatchMode):
    """Notes every operation."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self._watch.watching:
            return function(*args, **(kwargs or {}))
        leaves, tree = tree_flatten((args, kwargs or {}))
        noted = tuple(map(_leaf, leaves))  # before: it may change what it is given
        result = function(*args, **(kwargs or {}))
        made = tuple(_shape(leaf) for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor))
        self._watch.traced(Operation(function, direct_place(*_WATCHERS), noted, tree, made))
        return result


class _Functions(TorchFunctionMode):
    """Sees reads that are no operation: printing a tensor."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if self._watch.watching:
            self._watch.settle()
        return result


def _shape(tensor: Tensor) -> Shape:
    return Shape(tuple(tensor.shape), tensor.dtype)


def _leaf(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    is_number = leaf.device.type == "cpu" and leaf.dim() == 0
    return leaf.item() if is_number else _shape(leaf)


def _line() -> Place:
    """Return the user's line that runs; in a backward that of the forward, which autograd keeps (detect_anomaly)."""
    node = torch._C._current_autograd_node()
    stack = getattr(node, "metadata", {}).get("traceback_", ()) if node is not None else ()
    for frame in reversed(stack):
        match = re.match(r'\s*File "(.+?)", line (\d+)', frame)
        if match and is_users(match[1]):
            return Place(os.path.realpath(match[1]), int(match[2]))
    return direct_place(*_WATCHERS)


# ---------------------------------------------------------------- why a graph is another one


class Cause(NamedTuple):
    """Why a step was compiled.

    Attributes:
        kind: the batch, a shape, a number, other operations, or the same ones in another order.
        place: the user's line, nowhere for the batch and the order.
        before: what it was, as text.
        now: what it is.
    """

    kind: Literal["batch", "shape", "number", "way", "order"]
    place: Place
    before: str
    now: str


def cause(steps: list[TracedStep], index: int) -> Cause | None:
    """Return why step `index` had to be compiled, when earlier ones were; None if nothing in it is new.

    Operations of backwards and of optimizers follow from those of the user's lines: only these are compared.
    """
    now, earlier = steps[index], steps[:index]
    if now.batch not in [step.batch for step in earlier]:
        return Cause("batch", NOWHERE, _batch(earlier[0].batch), _batch(now.batch))
    alike = [step for step in earlier if _kinds(step) == _kinds(now)]
    if not alike:
        return _other_way(earlier[-1].users, now.users)
    if any(step.users == now.users for step in alike):
        return _other_order(alike, now)
    same = [step for step in alike if _shapes(step) == _shapes(now)]
    return _other_number(same[-1], now) if same else _other_shape(alike[-1], now)


def _kinds(step: TracedStep) -> list[Any]:
    return [operation.kind for operation in step.users]


def _shapes(step: TracedStep) -> list[Any]:
    return [operation.shapes for operation in step.users]


def _other_order(earlier: list[TracedStep], now: TracedStep) -> Cause | None:
    """Return that a backward had another order, unless it had that before: then the state of an optimizer is new."""
    functions = [operation.function for operation in now.operations]
    before = [[operation.function for operation in step.operations] for step in earlier]
    if functions not in before and Counter(functions) in [Counter(others) for others in before]:
        return Cause("order", NOWHERE, "", "")
    return None


def _other_number(old: TracedStep, now: TracedStep) -> Cause | None:
    pairs = [(a, b) for a, b in zip(old.users, now.users, strict=True) if a.numbers != b.numbers]
    for one, other in pairs:
        if _compiles(one, other):  # alone, too: an optimizer's new state may be why
            before, after = next(p for p in zip(one.numbers, other.numbers, strict=True) if p[0] != p[1])
            return Cause("number", other.place, f"{before:.6g}", f"{after:.6g}")
    return None


def _other_way(old: list[Operation], now: list[Operation]) -> Cause:
    pairs = zip(old, now, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a.kind != b.kind), min(len(old), len(now)))
    place = next((operation.place for operation in [*now[same:], *old[same:]]), NOWHERE)
    return Cause("way", place, f"{len(old)} operations", f"{len(now)} operations")


def _other_shape(old: TracedStep, now: TracedStep) -> Cause | None:
    for one, other in zip(old.users, now.users, strict=True):
        for before, after in zip(one.shapes, other.shapes, strict=True):
            if before != after:
                return Cause("shape", other.place, str(list(before.sizes)), str(list(after.sizes)))
    return None


def _batch(batch: Signature) -> str:
    return ", ".join(str(list(sizes)) for sizes, _ in batch)


def _compiles(old: Operation, new: Operation) -> bool:
    """Return whether an operation alone is compiled again with other numbers: most numbers are no part of a graph."""
    try:
        _launch(old)
        before = Runtime.counts().compiles
        _launch(new)
    except RuntimeError:  # it does not take tensors of ones
        return False
    return Runtime.counts().compiles > before


def _launch(operation: Operation) -> None:
    import torch_xla

    device = torch_xla.device()
    leaves = [
        torch.ones(leaf.sizes, dtype=leaf.dtype, device=device) if isinstance(leaf, Shape) else leaf
        for leaf in operation.leaves
    ]
    torch_xla.sync()
    args, kwargs = tree_unflatten(leaves, operation.tree)
    made = operation.function(*args, **kwargs)
    torch_xla.sync()
    del made  # only now: what nobody holds is not computed
