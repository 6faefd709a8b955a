"""Bytes told before a training equal those that are there after its first step."""

from __future__ import annotations

import pytest
import torch
from small import Small, loader, trained, trainer
from torch import nn

from xtrain import Callback
from xtrain.memory import Memory, state_of

NETS = (lambda: nn.Sequential(nn.Linear(3, 40), nn.Linear(40, 7, bias=False)), lambda: nn.Conv2d(3, 6, (1, 5)))
MATRICES = [lambda p: torch.optim.Muon(p, lr=0.01)]
OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, lr=0.1),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.Adam(p),
    lambda p: torch.optim.AdamW(p, amsgrad=True, fused=True),
    lambda p: torch.optim.Adafactor(p),
    lambda p: torch.optim.RMSprop(p, centered=True),
    lambda p: torch.optim.Adagrad(p),
]


def measured(optimizer):
    return sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v))


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_known_before_it_is_there(make, net, dtype):
    parameters = list(net().to(dtype).parameters())
    optimizer = make(parameters)
    torch.manual_seed(3)
    expected, drawn = state_of(optimizer, parameters), torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    before = [p.clone() for p in parameters]
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    already = measured(optimizer)
    optimizer.step()
    assert already in (0, measured(optimizer))
    assert expected == measured(optimizer)


@pytest.mark.parametrize("make", MATRICES)
def test_state_of_matrices(make):
    matrix = nn.Parameter(torch.randn(30, 20))
    optimizer = make([matrix])
    expected = state_of(optimizer, [matrix])
    matrix.grad = torch.ones_like(matrix)
    optimizer.step()
    assert expected == measured(optimizer) > 0


class Own(torch.optim.SGD):
    def step(self, closure=None):
        raise AssertionError("nobody may call it")


def test_what_cannot_be_told_is_not_guessed():
    parameters = list(nn.Linear(3, 1).parameters())
    assert state_of(torch.optim.LBFGS(parameters), parameters) is None  # wants a closure
    assert state_of(Own(parameters, lr=0.1), parameters) is None  # its step might wait for other ranks


class Asks(Callback):
    def on_fit_start(self, trainer, module):
        self.found = trainer.backend.memory(module, trainer.life.optimizers)


@pytest.mark.parametrize(("precision", "size"), [("32-true", 4), ("bf16-true", 2), ("bf16-mixed", 4)])
def test_memory_of_a_run(precision, size):
    class Frozen(Small):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Linear(10, 10).requires_grad_(False)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)

    asks = Asks()
    _, run = trained(module=Frozen(), callbacks=asks, precision=precision)
    assert asks.found == Memory(parameters=114 * size, gradients=4 * size, state=4 * size)
    assert measured(run.optimizers[0]) == 4 * size


def test_an_unknown_state_is_said(capsys):
    class Mine(Small):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

        def training_step(self, batch, batch_idx):
            pass

    trainer().fit(Mine(), loader())
    assert "not counted: the state of LBFGS" in capsys.readouterr().err
