"""Steps on a GPU: the functional operations of a recording, captured in a CUDA graph.

A captured graph reads and writes fixed memory. What is new at each step (the batch, gradients that live on) is copied
into tensors of the graph; what a user may keep (losses, logged values, what the step returned) is copied out of it.
New gradients stay in its memory: the replay that would overwrite them is the one that replaces them.

Before a graph is used, one replay is compared with the same operations run one by one, from the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from xtrain.compiled.recorded import Recorded
from xtrain.compiled.recording import Problem
from xtrain.errors import ProtocolError, explain

_OUTSIDE = Problem("a tensor on the CPU takes part in the step", "tensor.to(self.device) in __init__ or on_fit_start")


class Graphs(Protocol):
    """What a device offers to capture operations."""

    def warm_up(self, function: Callable[[], Any]) -> None:
        """Run `function` where libraries make what they keep, outside of any graph."""

    def capture(self, function: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        """Return the results of `function` in fixed memory, and what computes them again."""

    def random_state(self) -> Any:
        """Return the state of the device's generator."""

    def set_random_state(self, state: Any) -> None:
        """Restore it."""


class CudaGraphs:
    """CUDA graphs of the current device; each has memory of its own, which no other graph overwrites."""

    def warm_up(self, function: Callable[[], Any]) -> None:
        """Run `function` twice on a stream beside the current one, as torch asks for before a capture."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(side)

    def capture(self, function: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        """Capture `function`, which does not compute anything yet."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function()
        return outputs, graph.replay

    def random_state(self) -> Any:
        """Return the state of the device's generator."""
        return torch.cuda.get_rng_state()

    def set_random_state(self, state: Any) -> None:
        """Restore it."""
        torch.cuda.set_rng_state(state)


class Captured:
    """The operations of a step in a graph; called as the operations are.

    Args:
        gm: the functional operations, which change some of their inputs in place.
        recorded: the step.
        graphs: of the device.

    Raises:
        ProtocolError: if a replay computes something else than `gm`.
    """

    def __init__(self, gm: fx.GraphModule, recorded: Recorded, graphs: Graphs) -> None:
        self._gm, self._graphs = gm, graphs
        self._changing = [i for i, (kind, _) in enumerate(recorded.sources) if kind != "fixed"]
        gradients = {number for _, number in recorded.gradients if number is not None}
        shown = {*recorded.losses, *_numbers(recorded)}
        self._stays = gradients - shown
        given = [tensor.detach() for tensor in recorded.recording.inputs]
        self._inputs = [t.clone() if i in self._changing else t for i, t in enumerate(given)]
        writes = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
        placeholders = gm.graph.find_nodes(op="placeholder")
        self._written = [i for i in self._changing if any(node.args[0] is placeholders[i] for node in writes)]
        self._places = [t.data_ptr() for t in given]
        with torch.no_grad():
            state = graphs.random_state()
            graphs.warm_up(lambda: gm(*map(torch.clone, self._inputs)))
            graphs.set_random_state(state)
            self._outputs, self._replay = graphs.capture(lambda: list(gm(*self._inputs)))
            self._compare()

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Replay the step on `inputs`; returns its outputs."""
        for index, tensor in enumerate(inputs):
            if index not in self._changing and tensor.data_ptr() != self._places[index]:
                received, fix = "another memory (p.data = ...?)", "p.copy_(...) under torch.no_grad()"
                raise ProtocolError(explain("parameters in the memory that was captured", received, fix))
        for index in self._changing:
            self._inputs[index].copy_(inputs[index])
        self._replay()
        for index in self._written:  # gradients that are added to in place
            inputs[index].copy_(self._inputs[index])
        return [t if i in self._stays else t.clone() for i, t in enumerate(self._outputs)]

    def _compare(self) -> None:
        """Replay once, compare with the operations one by one, and undo what both did."""
        graphs, state = self._graphs, self._graphs.random_state()
        before = [tensor.clone() for tensor in self._inputs]
        expected_inputs = [tensor.clone() for tensor in self._inputs]
        expected = [*self._gm(*expected_inputs), *expected_inputs]
        graphs.set_random_state(state)
        self._replay()
        received = [*self._outputs, *self._inputs]
        same = all(torch.allclose(a, b, 1e-4, 1e-5, equal_nan=True) for a, b in zip(received, expected, strict=True))
        for tensor, old in zip(self._inputs, before, strict=True):
            tensor.copy_(old)
        graphs.set_random_state(state)
        if not same:
            fix = "Trainer(compile=None), and please report it"
            raise ProtocolError(explain("a captured graph that computes what its operations do", "other numbers", fix))


def _numbers(recorded: Recorded) -> list[int]:
    """Return the outputs that a user may keep: logged, returned or set as attributes."""
    values: list[Any] = [value for logged, _, _ in recorded.logs for value in logged.values()]
    values += [value for _, _, value in recorded.attributes]
    values += recorded.returned_slots()
    return [value.number for value in values if hasattr(value, "number")]


def captured(gm: fx.GraphModule, recorded: Recorded) -> Captured:
    """Return the operations of `recorded` in a CUDA graph.

    Raises:
        ProtocolError: see `Captured`; also for a tensor that is on the CPU, whose value would freeze.
    """
    if any(tensor.is_cpu for tensor in recorded.recording.inputs):
        raise ProtocolError(str(_OUTSIDE))
    return Captured(gm, recorded, CudaGraphs())
