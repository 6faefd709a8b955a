"""The shortcuts of backward and of optimizer steps: torch's bits, and nobody who watches is passed over."""

from __future__ import annotations

import copy

import pytest
import torch
from small import Small, trained
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from xtrain_backends.cpu import CPU
from xtrain_backends.eager import gradients, stepping

OPTIMIZERS = (
    torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax,
    torch.optim.ASGD, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.SGD,
)  # fmt: skip


def net_with_gradients():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
    net(torch.randn(5, 4)).square().mean().backward()
    return net


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_bare_step_is_torchs_to_the_bit(kind):
    ours, theirs = net_with_gradients(), net_with_gradients()
    optimizer, expected = kind(ours.parameters(), lr=0.01), kind(theirs.parameters(), lr=0.01)
    assert stepping._bare(kind.step) is not None
    for _ in range(3):
        assert stepping.step_of(optimizer)() is expected.step() is None
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.is_grad_enabled()


def test_a_closure_gets_gradients_and_its_loss_comes_back():
    net = net_with_gradients()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    assert stepping.step_of(optimizer)(lambda: net(torch.ones(1, 4)).requires_grad) is True


@pytest.fixture
def optimizer():
    return torch.optim.SGD(net_with_gradients().parameters(), lr=0.1)


def test_hooks_of_optimizers_run(optimizer):
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    stepping.step_of(optimizer)()
    optimizer = copy.deepcopy(optimizer)
    optimizer._optimizer_step_pre_hooks.clear()
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    stepping.step_of(optimizer)()
    handle = register_optimizer_step_post_hook(lambda *_: seen.append("any"))
    optimizer._optimizer_step_post_hooks.clear()
    stepping.step_of(optimizer)()
    handle.remove()
    assert seen == ["before", "after", "any"]


def test_the_profiler_sees_the_step(optimizer):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        stepping.step_of(optimizer)()
    assert "Optimizer.step#SGD.step" in [event.key for event in profile.key_averages()]


def test_a_step_that_was_overridden_or_replaced_is_called():
    class Own(torch.optim.SGD):
        stepped = 0

        def step(self, closure=None):
            self.stepped += 1
            return super().step(closure)

    class Own2(Own):
        pass

    for kind in (Own, Own2):
        optimizer = kind(net_with_gradients().parameters(), lr=0.1)
        stepping.step_of(optimizer)()
        assert optimizer.stepped == 1
    optimizer = torch.optim.SGD(net_with_gradients().parameters(), lr=0.1)
    optimizer.step = lambda closure=None: "replaced"
    assert stepping.step_of(optimizer)() == "replaced"


def test_schedulers_see_that_the_optimizer_stepped(optimizer):
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    stepping.step_of(optimizer)()
    scheduler.step()  # would warn, which is an error here


def test_a_differentiable_optimizer_keeps_its_graph():
    weight = torch.ones(1, requires_grad=True)
    parameter = weight * 1.0
    optimizer = torch.optim.SGD([parameter.detach().requires_grad_()], lr=0.1, differentiable=True)
    (inner,) = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = [parameter]
    parameter.grad = torch.ones(1)
    stepping.step_of(optimizer)()
    assert inner is not parameter
    assert parameter.grad_fn is not None


# ---------------------------------------------------------------- backward


def test_a_plain_backward_adds_to_gradients_and_frees_the_graph():
    weight = torch.ones(3, requires_grad=True)
    loss = weight.square().sum()
    CPU().backward(loss)
    CPU().backward(weight.sum())
    assert weight.grad.tolist() == [3.0] * 3
    with pytest.raises(RuntimeError, match="second time"):
        CPU().backward(loss)


def test_a_hook_that_writes_into_the_first_gradient_changes_no_other_backward(monkeypatch):
    monkeypatch.setattr(gradients, "_ONE", torch.ones(()))
    weight = torch.ones(2, requires_grad=True)
    for _ in range(3):
        loss = weight.sum() * 1
        loss.register_hook(lambda gradient: gradient.mul_(2.0) and None)
        CPU().backward(loss)
    assert weight.grad.tolist() == [6.0] * 2


def test_a_loss_that_is_a_parameter_gets_a_gradient_of_its_own():
    class Scalar(Small):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(1.0))

        def training_step(self, batch, batch_idx):
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(self.weight)
            self.weight.grad.mul_(3.0)
            opt.step()

    assert trained(module=Scalar())[0].weight.item() == pytest.approx(1.0 - 4 * 0.3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_losses_take_torchs_way(dtype):
    weight = torch.ones(3, requires_grad=True)
    CPU().backward(weight.to(dtype).sum())
    CPU().backward((weight * 2).sum().reshape(1))
    CPU().backward(weight * 1, torch.ones(3))
    assert weight.grad.tolist() == [4.0] * 3
