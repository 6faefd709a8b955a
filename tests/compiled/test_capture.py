"""The bookkeeping of captured steps: on the CPU a stand-in repeats the operations where a GPU would replay a graph."""

from __future__ import annotations

import pytest
import torch
from small import says
from test_compiled_step import Model, assert_same, data, fit

from xtrain import ProtocolError
from xtrain.compiled import step
from xtrain.compiled.building import functional
from xtrain.compiled.capture import Captured, captured


class StandIn:
    """Keeps what a graph would: its operations and the memory of its results. Like a graph, it hands out no copies."""

    def __init__(self, wrong=False):
        self.warmed = 0
        self.wrong = wrong
        self.results = []

    def warm_up(self, function):
        self.warmed += 1
        function()

    def capture(self, function):
        random_state = self.random_state()
        held = [cell.cell_contents for cell in function.__closure__]
        inputs = next(h._inputs for h in held if isinstance(h, Captured))
        before = [tensor.clone() for tensor in inputs]
        outputs = [tensor.clone() for tensor in function()]  # a real capture computes nothing
        for tensor, old in zip(inputs, before, strict=True):
            tensor.copy_(old)
        self.set_random_state(random_state)
        self.results.append(outputs)

        def replay():
            with torch.no_grad():
                for place, new in zip(outputs, function(), strict=True):
                    place.copy_(new + 1 if self.wrong else new)

        return outputs, replay

    random_state = staticmethod(torch.get_rng_state)
    set_random_state = staticmethod(torch.set_rng_state)


@pytest.fixture
def graphs(monkeypatch):
    """Let steps be captured by a `StandIn`, which is returned."""
    stand_in = StandIn()
    build = lambda recorded: Captured(functional(recorded.recording), recorded, stand_in)  # noqa: E731
    fixed = lambda: monkeypatch.setattr(step, "build", build)  # noqa: E731
    monkeypatch.setattr("test_compiled_step.without_inductor", _calling(fixed))
    return stand_in


def _calling(function):
    from contextlib import contextmanager

    @contextmanager
    def context():
        function()
        yield

    return context


def test_captured_steps_train_the_same_with_random_numbers_and_two_shapes(graphs):
    assert_same(Model, epochs=4, batches=data(6, last=3), replays=True)
    assert (graphs.warmed, len(graphs.results)) == (2, 2)


class Accumulating(Model):
    """Adds gradients over two batches, in place."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.manual_backward(loss / 2)
        if batch_idx % 2:
            opt = self.optimizers()
            opt.step()
            opt.zero_grad()
        return loss


def test_gradients_that_live_across_steps_are_copied_in_and_out(graphs):
    assert_same(Accumulating, replays=True)


def test_what_a_user_keeps_is_no_memory_of_the_graph(graphs):
    class Keeping(Model):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx)
            self.kept = [*getattr(self, "kept", []), outputs["loss"]]

    module = Keeping()
    fit(module)
    assert [float(loss) for loss in module.kept] == module.losses
    assert len(set(module.losses)) == len(module.losses)


def test_a_graph_that_computes_something_else_is_not_used(graphs):
    graphs.wrong = True
    assert_same(Model, replays=False, reasons=["a captured graph that computes what its operations do"])


def test_a_parameter_that_moved_is_an_error(graphs):
    class Moving(Model):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 6:
                self.net[3].weight.data = self.net[3].weight.data.clone()

    with pytest.raises(ProtocolError) as caught:
        fit(Moving())
    says(caught.value, "p.data")


def test_tensors_of_the_host_are_refused():
    trainer, _ = fit(Model())
    recorded = trainer.compiled_step.paths[0].recorded
    with pytest.raises(ProtocolError, match="a tensor on the CPU takes part in the step"):
        captured(functional(recorded.recording), recorded)
