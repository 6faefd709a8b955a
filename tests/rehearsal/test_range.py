"""The figures of the check of ranges, against plain PyTorch."""

import copy

import pytest
import torch
from torch import nn

from xtrain import LightningModule
from xtrain.rehearsal.check import Request
from xtrain.rehearsal.checks.range import Range
from xtrain.rehearsal.findings import Figure, Finding, Skipped
from xtrain.rehearsal.subject import in_memory

BATCHES = [torch.randn(16, 8, generator=torch.Generator().manual_seed(n)) for n in range(4)]


class Net(LightningModule):
    def __init__(self, size=1e-5, rate=1e-3):
        super().__init__()
        self.automatic_optimization = False
        self.net, self.size, self.rate = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)), size, rate

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)

    def loss(self, batch):
        return self.net(batch).square().mean() * self.size

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.loss(batch))
        opt.step()


def looked_at(module, *targets):
    found = list(Range().run(Request(in_memory(module, BATCHES), frozenset(targets))))
    return {f.name: f.value for f in found if isinstance(f, Figure)}, found


def plain(module):
    """Train in fp32, and yield the gradients and the parameters before and after each step."""
    module = copy.deepcopy(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=module.rate)
    for batch in BATCHES:
        optimizer.zero_grad()
        module.loss(batch).backward()
        before = [p.detach().clone() for p in module.parameters()]
        optimizer.step()
        yield [p.grad.clone() for p in module.parameters()], before, [p.detach().clone() for p in module.parameters()]


def test_shares_are_those_of_plain_pytorch():
    torch.manual_seed(0)
    module = Net(size=3e-5, rate=400.0)
    figures, _ = looked_at(module, "16-true", "16-mixed", "bf16-true")
    gradients, moves, stays = [], 0, 0
    for grads, before, after in plain(module):
        gradients += [g.flatten() for g in grads]
        for old, new in zip(before, after, strict=True):
            moves += int((old != new).sum())
            stays += int(((old != new) & ((old.bfloat16().float() + (new - old)).bfloat16() == old.bfloat16())).sum())
    every = torch.cat(gradients)
    lost = (every.half() == 0) & (every != 0)
    assert 0.05 < float(lost.sum() / (every != 0).sum()) < 0.95
    assert figures["range.vanished"]["16-true"] == pytest.approx(float(lost.sum() / (every != 0).sum()), abs=0.01)
    assert figures["range.vanished"]["16-mixed"] == 0.0
    assert 0.05 < stays / moves < 0.95
    assert figures["range.unmoved"] == pytest.approx(stays / moves, abs=0.01)


def test_the_scale_is_the_one_that_a_real_training_in_fp16_backs_off_to():
    torch.manual_seed(0)
    module = Net(size=1e-2)
    figures, _ = looked_at(module, "16-mixed")
    subject = in_memory(module, BATCHES)
    trainer = subject.fit(subject.module(), 60, precision="16-mixed", scaler_kwargs={"init_scale": 2.0**40})
    assert trainer.backend.scaler.current_scale == figures["range.scale"]


def test_an_overflow_that_real_fp16_cannot_confirm_is_told_with_the_reason():
    class Refuses(Net):
        def training_step(self, batch, batch_idx):
            if self.trainer.precision.name == "16-mixed":
                raise RuntimeError("no kernel for Half")
            super().training_step(1e6 * batch, batch_idx)

    found = looked_at(Refuses(), "16-mixed")[1]
    assert [f.id for f in found if isinstance(f, Finding) and f.severity is None][:1] == ["XT-RANGE-01"]
    assert next(f.reason for f in found if isinstance(f, Skipped)).endswith("RuntimeError: no kernel for Half")
