"""One real step, written down below autograd as it runs, and changed in nothing by that.

A `torch.utils._python_dispatch.TorchDispatchMode` sees every operation of the forwards, the backwards and the
optimizers, in the order in which they run. Tensors that no operation of the step made are its inputs.
"""

from __future__ import annotations

import linecache
import operator
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

_OURS = Path(__file__).parent.parent
_NOT_OF_THE_USER = (str(Path(torch.__file__).parent), str(_OURS), "<")
_TESTING = str(_OURS / "testing")  # experiments play the user
_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_VALUE_FIX = "keep it a tensor (torch.where, x * mask), or read it in on_train_batch_end"


@dataclass(frozen=True)
class Problem:
    """What a replay of a step would miss.

    Attributes:
        what: in the words of the user.
        fix: what to write instead.
        location: file, number and text of the line that did it.
    """

    what: str
    fix: str
    location: str = ""

    def __str__(self) -> str:
        return f"{self.what}{self.location}. Fix:  {self.fix}"


def is_of_user(frame: Any) -> bool:
    """Return whether `frame` runs code that is neither torch's nor xtrain's."""
    file = frame.f_code.co_filename
    return file.startswith(_TESTING) or not file.startswith(_NOT_OF_THE_USER)


def user_location() -> str:
    """Return file, line and text of the innermost frame that is neither torch's nor xtrain's."""
    frame = sys._getframe(1)
    while frame is not None and not is_of_user(frame):
        frame = frame.f_back  # type: ignore[assignment]  # ends as None
    if frame is None:
        return ""
    file, line = frame.f_code.co_filename, frame.f_lineno
    text = linecache.getline(file, line).strip()
    return f" ({file}:{line}: {text})"


@dataclass
class Recording:
    """The operations of one step.

    Attributes:
        graph: the operations, as they ran.
        inputs: the tensors that the step did not make, by position of their placeholder.
        labels: what each input is; ``"constant"`` is one that nobody knows.
        problems: what a replay would miss.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    inputs: list[Tensor] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def operations(self) -> list[tuple[Any, ...]]:
        """Return the operations with their arguments, as values that can be compared with another recording's."""
        position: dict[fx.Node, Any] = {}
        labels = iter(self.labels)
        found: list[tuple[Any, ...]] = []
        for node in self.graph.nodes:
            if node.op == "placeholder":
                position[node] = next(labels)
            elif node.op == "call_function":
                position[node] = len(found)
                flat, spec = pytree.tree_flatten((node.args, node.kwargs), is_leaf=lambda x: isinstance(x, fx.Node))
                values = [("of", position[x]) if isinstance(x, fx.Node) else _comparable(x) for x in flat]
                found.append((str(node.target), *values, str(spec)))
        return found

    def difference(self, other: Recording) -> str | None:
        """Return the first operation in which `other` differs, or None."""
        ours, theirs = self.operations(), other.operations()
        for index, (a, b) in enumerate(zip(ours, theirs, strict=False)):
            if a != b:
                return f"operation {index} is {_readable(b)}, and was {_readable(a)}"
        if len(ours) != len(theirs):
            longer, word = (theirs, "more") if len(theirs) > len(ours) else (ours, "less")
            first = longer[min(len(ours), len(theirs))]
            return f"{abs(len(ours) - len(theirs))} operations {word}, the first of them {_readable(first)}"
        return self._other_constant(other)

    def _other_constant(self, other: Recording) -> str | None:
        for label, a, b in zip(self.labels, self.inputs, other.inputs, strict=True):
            if label == "constant" and a is not b and not _same_values(a, b):
                return f"a tensor that Python made is {b.flatten()[:3].tolist()}, and was {a.flatten()[:3].tolist()}"
        return None


def _same_values(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))


def _comparable(value: Any) -> Any:
    """Return what two recordings of the same step have in common of an argument."""
    if isinstance(value, float) and value != value:
        return "nan"
    plain = value is None or isinstance(value, int | float | str | torch.dtype | torch.device | torch.layout)
    return (type(value).__name__, value) if plain else str(type(value))


def _readable(operation: tuple[Any, ...]) -> str:
    values = [str(v[1]) if isinstance(v, tuple) and v[0] != "of" else "..." for v in operation[1:-1]]
    return f"{operation[0]}({', '.join(values)})"


class Recorder(TorchDispatchMode):
    """Writes down what runs inside its context.

    Args:
        names: what is known of a tensor that exists before the step, by `id`; the tensors must live on.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording()
        self._names = names
        self._nodes: Any = WeakTensorKeyDictionary()
        self._last: fx.Node | None = None  # of the placeholders, which come first

    def node(self, tensor: Tensor) -> fx.Node:
        """Return the node of `tensor`; one that the step did not make becomes an input."""
        if tensor not in self._nodes:
            recording = self.recording
            graph, last = recording.graph, self._last
            with graph.inserting_before() if last is None else graph.inserting_after(last):
                self._last = graph.placeholder(f"in_{len(recording.inputs)}")
            self._nodes[tensor] = self._last
            recording.inputs.append(tensor)
            recording.labels.append(self._names.get(id(tensor), "constant"))
        return self._nodes[tensor]  # type: ignore[no-any-return]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and write it down."""
        kwargs = kwargs or {}
        if func.namespace == "profiler":  # of optimizer.step
            return func(*args, **kwargs)
        if _READS & set(func.tags):
            what = f"a value of a tensor was read ({func})"
            self.recording.problems.append(Problem(what, _VALUE_FIX, user_location()))
            return func(*args, **kwargs)
        if any(isinstance(x, torch.Generator) for x in pytree.tree_leaves((args, kwargs))):
            what = "random numbers were drawn from a generator of its own"
            self.recording.problems.append(Problem(what, "draw them without generator=", user_location()))
        arguments = pytree.tree_map(lambda x: self.node(x) if isinstance(x, Tensor) else x, (args, kwargs))
        out = func(*args, **kwargs)
        node = self.recording.graph.call_function(func, *arguments)
        given = {id(x) for x in pytree.tree_leaves((args, kwargs))}
        many = isinstance(out, list | tuple)
        for index, value in enumerate(out if many else [out]):
            if isinstance(value, Tensor) and id(value) not in given:  # an operation in place returns its argument
                item = self.recording.graph.call_function(operator.getitem, (node, index)) if many else node
                self._nodes[value] = item
        return out

    def finish(self, outputs: Iterable[Tensor]) -> Recording:
        """Return the recording of a step that results in `outputs`."""
        self.recording.graph.output([self.node(tensor) for tensor in outputs])
        return self.recording
