"""What the check of agreement compares: trainings with the same numbers, on real backends and real processes."""

import pytest
import torch
import torch._dynamo  # once, in place of in each fork
from torch import nn

from xtrain import LightningModule
from xtrain.precision import PRECISIONS
from xtrain.registry import registered_backends
from xtrain.rehearsal.check import PROCESSES, Request
from xtrain.rehearsal.checks.agreement import Agreement
from xtrain.rehearsal.checks.calls import SUMS, Calls, first_parting
from xtrain.rehearsal.checks.draws import Draws
from xtrain.rehearsal.checks.halves import Batches, halved
from xtrain.rehearsal.findings import Figure, Finding, Skipped
from xtrain.rehearsal.subject import in_memory

BATCHES = [torch.randn(8, 4, generator=torch.Generator().manual_seed(n)) for n in range(4)]


class Net(LightningModule):
    """Trains with dropout and noise; `loss` is what the step makes of the output."""

    def __init__(self, loss=lambda module, out, index: out.square().mean()):
        super().__init__()
        self.automatic_optimization = False
        self.net, self.loss = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)), loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.loss(self, self.net(batch + torch.randn_like(batch)), batch_idx))
        opt.step()


def compared(loss, *targets, steps=4):
    module = Net(loss)
    found = list(Agreement().run(Request(in_memory(module, BATCHES), frozenset(targets), steps)))
    figures = {key: value for f in found if isinstance(f, Figure) for key, value in f.value.items()}
    return [f for f in found if isinstance(f, Finding)], [f for f in found if isinstance(f, Skipped)], figures


def test_a_small_difference_on_one_backend_is_told_with_the_step_and_both_numbers():
    def loss(module, out, index):
        factor = 1.02 if index == 2 and module.trainer.backend.name == "fsdp" else 1.0
        return out.square().mean() * factor

    (found,), skipped, _ = compared(loss, "fsdp")
    assert (found.id, found.target, skipped) == ("XT-AGREE-01", "fsdp", [])
    assert "first in step 3, optimizer 0 (SGD): net." in found.message
    assert " and not " in found.message


def test_what_agrees_is_told_as_a_figure():
    found, skipped, figures = compared(lambda module, out, index: out.square().mean(), "fsdp", PROCESSES)
    assert (found, skipped) == ([], [])
    assert figures.keys() == {"fsdp", PROCESSES}
    assert max(figures.values()) < 1e-5


def test_random_numbers_that_python_draws_by_rank_are_not_compared():
    import random

    def loss(module, out, index):
        return out.square().mean() * sum(random.random() for _ in range(len(out)))

    found, (skipped,), figures = compared(loss, PROCESSES, steps=2)
    assert (found, figures) == ([], {})
    assert "NumPy" in skipped.reason


@pytest.mark.parametrize(
    ("targets", "severity"),
    [({PROCESSES}, "warning"), ({*PRECISIONS, PROCESSES, *registered_backends()}, "info")],
    ids=["asked", "all"],
)
def test_what_may_be_meant_is_told_as_loud_as_it_was_asked_for(monkeypatch, targets, severity):
    from xtrain.rehearsal.checks.agreement import _Comparison

    monkeypatch.setattr(_Comparison, "precisions", lambda self: ())
    monkeypatch.setattr(_Comparison, "backends", lambda self: ())
    (found,), _, _ = compared(lambda module, out, index: out.square().sum(), *targets, steps=2)
    assert (found.id, found.severity) == ("XT-AGREE-03", severity)


# ---------------------------------------------------------------- parts


def draw(rows):
    held = [torch.rand(rows, 2), torch.randn_like(torch.zeros(rows)), torch.rand(3)]
    return [*held, nn.functional.dropout(torch.ones(rows, 5), 0.4), torch.empty(rows).bernoulli_()]


def test_halves_get_the_rows_of_the_whole():
    whole = Draws()
    with whole:
        whole.inside = True
        expected = draw(6)
    for part in (0, 1):
        half = Draws(whole.seen, part)
        with half:
            half.inside = True
            received = draw(3)
        rows = slice(3 * part, 3 * part + 3)
        for name, (one, other) in enumerate(zip(expected, received, strict=True)):
            assert torch.equal(one if name == 2 else one[rows], other)
        assert half.parted == ""


def test_other_draws_are_noticed():
    whole = Draws()
    with whole:
        whole.inside = True
        torch.randperm(6)
    half = Draws(whole.seen, 0)
    with half:
        half.inside = True
        torch.randperm(3)
    assert "draws other random numbers" in half.parted


def test_batches_are_halved_and_kept_as_they_are():
    batch = {"x": torch.arange(4.0), "names": ["a", "b", "c", "d"], "pair": (torch.ones(4, 2), None, 3)}
    ((first,), (second,)) = halved([batch])
    assert (first["x"].tolist(), second["x"].tolist()) == ([0.0, 1.0], [2.0, 3.0])
    assert (first["names"], second["names"], first["pair"][2]) == (["a", "b"], ["c", "d"], 3)
    assert "3 samples" in halved([torch.ones(3)])
    assert "4 and 6 rows" in halved([(torch.ones(4), torch.ones(6))])
    loader = Batches([torch.zeros(2)])
    next(iter(loader)).add_(1.0)
    assert next(iter(loader)).sum() == 0


def test_the_line_of_a_sum_is_found():
    def trace(rows):
        calls = Calls()
        with calls:
            calls.step = 1
            squares = rows.square()
            calls_of_line = squares.sum()
            assert calls_of_line.dim() == 0
        return calls.seen

    rows = torch.randn(8, 3)
    found = first_parting(trace(rows), [trace(rows[:4]), trace(rows[4:])], 1e-4)
    assert (found.way, found.name) == (SUMS, "sum")
