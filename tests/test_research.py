"""Steps as researchers write them: run by xtrain, and by a bare loop with the verbs of torch, they train alike."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from small import SCALED, assert_equal, trainer
from torch import nn
from torch.func import functional_call
from torch.nn.functional import mse_loss
from torch.optim import lr_scheduler as schedules

from xtrain import Callback, LightningModule

PRECISIONS = {
    "32-true": ({}, None, 1e-6),
    "bf16-mixed": ({"precision": "bf16-mixed"}, torch.bfloat16, 1e-6),
    "16-mixed": (SCALED, torch.float16, 2e-3),
}
every_precision = pytest.mark.parametrize("precision", PRECISIONS)


def data(count=6):
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 4, generator=draw), torch.randn(8, 1, generator=draw)) for _ in range(count)]


def perceptron(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


class Research(LightningModule):
    """Two networks; `step` is the researcher's, `optimizer` makes one optimizer of each network."""

    def __init__(self, step, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5), schedule=None):
        super().__init__()
        self.automatic_optimization = False
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.a, self.b, self.late = perceptron(4, 1), perceptron(4, 4), nn.Linear(4, 1)
        self.step, self.make, self.schedule = step, optimizer, schedule

    def configure_optimizers(self):
        pair = [self.make(self.a.parameters()), self.make(self.b.parameters())]
        return pair, [self.schedule(pair[0])] if self.schedule else []

    def training_step(self, batch, batch_idx):
        verbs = SimpleNamespace(backward=self.manual_backward, clip=self.clip_gradients)
        self.step(self, verbs, self.optimizers(), batch, batch_idx)
        if self.schedule:
            self.lr_schedulers().step()


def plainly(module, dtype):
    """Train `module` without xtrain."""

    def backward(loss, **options):
        with torch.autocast("cpu", enabled=False):
            loss.backward(**options)

    def clip(optimizer, value):
        return nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], value)

    verbs = SimpleNamespace(backward=backward, clip=clip)
    pair, scheduled = module.configure_optimizers()
    for index, batch in enumerate(data()):
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype, cache_enabled=False):
            module.step(module, verbs, pair, batch, index)
        for schedule in scheduled:
            schedule.step()


def trains_alike(module, precision="32-true"):
    options, dtype, tolerance = PRECISIONS[precision]
    reference, start = copy.deepcopy(module), copy.deepcopy(module)
    plainly(reference, dtype)
    run = trainer(**options)
    run.fit(module, data())
    for trained, expected in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(trained, expected, atol=tolerance, rtol=0)
    assert any((p != q).any() for p, q in zip(module.a.parameters(), start.a.parameters(), strict=True))
    assert run.global_step == 6
    return module


# ---------------------------------------------------------------- steps


def inner_minibatches(m, do, opts, batch, index):
    """Proximal policy optimization: several passes over minibatches in one training step."""
    x, y = batch
    with torch.no_grad():
        before = m.a(x)
    for rows in torch.arange(8).split(2) * 2:
        opts[0].zero_grad()
        new = m.a(x[rows])
        do.backward(mse_loss(new.float(), y[rows]) + 0.1 * mse_loss(new.float(), before[rows].float()))
        do.clip(opts[0], 0.5)
        opts[0].step()


def higher_order(m, do, opts, batch, index):
    """Meta-learning: the loss after a step of gradient descent that is differentiated too."""
    x, y = batch
    weights = dict(m.a.named_parameters())
    inner = mse_loss(functional_call(m.a, weights, x[:4]).float(), y[:4])
    slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
    fast = {name: w - 0.1 * g for (name, w), g in zip(weights.items(), slopes, strict=True)}
    opts[0].zero_grad()
    do.backward(mse_loss(functional_call(m.a, fast, x[4:]).float(), y[4:]))
    opts[0].step()


def gradient_penalty(m, do, opts, batch, index):
    """A Wasserstein critic with its penalty; the generator steps every second time."""
    x, _ = batch
    fake = m.b(x.flip(0))
    between = (0.5 * x + 0.5 * fake.detach().float()).requires_grad_()
    (slope,) = torch.autograd.grad(m.a(between).float().sum(), between, create_graph=True)
    opts[0].zero_grad()
    do.backward((m.a(fake.detach()) - m.a(x)).float().mean() + (slope.norm(dim=1) - 1).square().mean())
    opts[0].step()
    if index % 2 == 0:
        opts[1].zero_grad()
        do.backward(-m.a(fake).float().mean())
        opts[1].step()


def inner_solver(m, do, opts, batch, index):
    """Sparse coding: the codes of a batch are found by an optimizer of their own, which no one else knows."""
    x, _ = batch
    codes = torch.zeros(8, 4, requires_grad=True)
    solver = torch.optim.LBFGS([codes], max_iter=4)
    layer = copy.deepcopy(m.b).requires_grad_(False)

    def residual():
        solver.zero_grad()
        loss = mse_loss(layer(codes), x) + 0.01 * codes.abs().mean()
        loss.backward()
        return loss

    with torch.autocast("cpu", enabled=False):
        solver.step(residual)
    for opt in opts:
        opt.zero_grad()
    do.backward(mse_loss(m.b(codes.detach()).float(), x) + m.a(codes.detach()).float().square().mean())
    for opt in opts:
        opt.step()


def grows(m, do, opts, batch, index):
    """A layer that joins the optimizer in the middle of the training."""
    if index == 2:
        opts[0].add_param_group({"params": list(m.late.parameters()), "lr": 0.05})
    x, y = batch
    opts[0].zero_grad()
    do.backward(mse_loss((m.a(x) + m.late(x)).float(), y))
    do.clip(opts[0], 0.2)
    opts[0].step()


def freezes(m, do, opts, batch, index):
    """A layer that is frozen for a while."""
    m.a[0].requires_grad_(index not in (2, 3))
    plain(m, do, opts, batch, index)


def plain(m, do, opts, batch, index):
    x, y = batch
    opts[0].zero_grad()
    do.backward(mse_loss(m.a(x).float(), y))
    do.clip(opts[0], 0.2)
    opts[0].step()


STEPS = [inner_minibatches, higher_order, gradient_penalty, inner_solver, grows, freezes]


@every_precision
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_step(step, precision):
    trains_alike(Research(step), precision)


# ---------------------------------------------------------------- optimizers and schedules


@every_precision
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_implementation_of_the_optimizer(options, precision):
    make = lambda parameters: torch.optim.AdamW(parameters, lr=0.01, eps=1e-3, **options)  # noqa: E731
    trains_alike(Research(plain, make), precision)


SCHEDULES = {
    "StepLR": lambda o: schedules.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [1, 4], 0.5),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.3, 3),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.3, total_steps=6),
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda n: 0.9**n),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda n: 0.9),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ExponentialLR(o, 0.9), schedules.ConstantLR(o, 0.3, 3)]
    ),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=2), schedules.CosineAnnealingLR(o, 4)], [2]
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_schedule_of_every_kind(schedule):
    trains_alike(Research(plain, schedule=schedule))


# ---------------------------------------------------------------- around the step


@every_precision
def test_compiled_networks(precision):
    class Compiled(Research):
        def configure_model(self):
            for network in (self.a, self.b):
                network.compile(backend="aot_eager")

    module = trains_alike(Compiled(two_phases), precision)
    assert module.a._compiled_call_impl is not None


def two_phases(m, do, opts, batch, index):
    """Both phases of a GAN go through the same compiled discriminator; its backward runs twice."""
    x, _ = batch
    fake = m.b(x.flip(0))
    for opt in opts:
        opt.zero_grad()
    do.backward((m.a(fake.detach()) - m.a(x)).float().mean(), inputs=list(m.a.parameters()))
    opts[0].step()
    do.backward(-m.a(fake).float().mean(), inputs=list(m.b.parameters()))
    opts[1].step()


def test_moving_average_of_the_weights():
    class Average(Callback):
        def on_fit_start(self, trainer, module):
            self.copy = copy.deepcopy(module.a)

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            with torch.no_grad():
                for mean, p in zip(self.copy.parameters(), module.a.parameters(), strict=True):
                    mean.lerp_(p, 0.25)

    average, module, reference = Average(), Research(plain), Research(plain)
    trainer(callbacks=average).fit(module, data())
    expected = copy.deepcopy(reference.a)
    optimizer = reference.make(reference.a.parameters())
    for x, y in data():
        optimizer.zero_grad()
        mse_loss(reference.a(x), y).backward()
        nn.utils.clip_grad_norm_(reference.a.parameters(), 0.2)
        optimizer.step()
        with torch.no_grad():
            for mean, p in zip(expected.parameters(), reference.a.parameters(), strict=True):
                mean.lerp_(p, 0.25)
    assert_equal(average.copy, expected)
    assert all(p.requires_grad for p in average.copy.parameters())
