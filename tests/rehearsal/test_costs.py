"""Memory and FLOPs of a rehearsal, against counts by hand and against what torch's profiler saw a real run allocate."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from xtrain import LightningModule
from xtrain.rehearsal import Settings, rehearse
from xtrain.rehearsal.checks.meter import measure
from xtrain.rehearsal.subject import Source, Subject


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x):
        heads = [part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.project(x).chunk(3, dim=-1)]
        return scaled_dot_product_attention(*heads)


class Module(LightningModule):
    def __init__(self, net, ask=False):
        super().__init__()
        self.automatic_optimization = False
        self.net, self.ask = net, ask

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        loss = self.net(batch).square().mean()
        if self.ask:
            loss = loss + batch[batch > 10].sum()  # a shape that depends on numbers
        self.manual_backward(loss)
        opt.step()


def subject(make, batch, **options):
    return Subject(lambda: Module(make(), **options), [batch] * 4)


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def conv():
    return nn.Conv2d(3, 5, 3, padding=1)


# By hand, per step: forward, the gradients of weights, and those of inputs where a layer before them is trained.
MLP = 2 * 32 * (8 * 16 * 2 + 16 * 4 * 3)
CONV = 2 * (2 * 5 * 6 * 6 * 5 * 3 * 3 * 3)  # images * height * width * outputs * inputs * 3x3, twice
# Queries times keys and weights times values, for each of 2 * 2 heads; backward makes them again, and four more.
ATTENTION = 2 * 2 * (2 * 6) * 8 * 24 + (2 + 5) * 2 * (2 * 2 * 6 * 6 * 4)


@pytest.mark.parametrize(
    ("make", "shape", "flops"),
    [(mlp, (32, 8), MLP), (conv, (5, 3, 6, 6), CONV), (Attention, (2, 6, 8), ATTENTION)],
    ids=["mlp", "conv", "attention"],
)
def test_flops_are_those_counted_by_hand(make, shape, flops):
    found = measure(subject(make, torch.randn(shape)), steps=4)
    assert found.fake
    assert found.meter.flops == 4 * flops
    assert found.optimizers == {"optimizer 0 (Adam)": 4 * flops}


def allocated(make, batch):
    """Return the bytes of the peak of a hand-written loop after its first step, as torch's profiler saw them."""
    net = make()
    opt = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step():
        opt.zero_grad()
        net(batch).square().mean().backward()
        opt.step()

    step()
    kept = sum(p.nbytes + 2 * p.nbytes + 4 for p in net.parameters()) + batch.nbytes  # gradients will be dropped
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    live = peak = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return kept + peak


@pytest.mark.parametrize("ask", [False, True], ids=["without numbers", "where the module asks for numbers"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256), nn.Tanh()), (1024, 256)),
        (lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()), (32, 3, 24, 24)),
    ],
    ids=["linear", "conv"],
)
def test_memory_is_what_a_real_run_allocates(make, shape, ask):
    batch = torch.randn(shape)
    found = measure(subject(make, batch, ask=ask), steps=3)
    assert found.fake is not ask
    peak = found.meter.peak
    parameters = sum(p.nbytes for p in make().parameters())
    assert peak["parameters"] == parameters
    assert peak["state"] == 2 * parameters + 4 * len(list(make().parameters()))
    expected = allocated(make, batch)
    assert abs(sum(peak.values()) - expected) < 0.1 * expected


def test_the_largest_batch_is_the_largest_that_fits():
    source = Source("", batch="16x256")
    made = subject(lambda: nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 8)), torch.randn(16, 256))
    settings = Settings(checks=("memory",), targets=("cuda",), memory=16 * 2**20)
    largest = rehearse(source, settings, made).figures["memory.largest_batch"]["cuda"]
    for batch, fits in ((largest, True), (largest + largest // 5, False)):
        made.data = [torch.randn(batch, 256)] * 4
        assert (rehearse(source, settings, made).status == 0) is fits
