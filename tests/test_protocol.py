"""Wrong orders in the life of a gradient, and wrong arguments of its verbs: refused, in the user's words."""

from __future__ import annotations

import math
import warnings
from contextlib import contextmanager

import pytest
import torch
from small import SCALED, Automatic, Doing, assert_equal, loader, net, refused, says, trained
from torch import nn

from xtrain import ConfigurationError, ProtocolError

# ---------------------------------------------------------------- clipping


@pytest.mark.parametrize("value", [0, 0.0, -1, math.nan, -math.inf, "1", True, torch.tensor(1.0)])
def test_clip_value_that_means_nothing(value):
    def body(module, opt, batch):
        module.manual_backward(module.loss(batch))
        module.clip_gradients(opt, gradient_clip_val=value)

    refused(ConfigurationError, body, "gradient_clip_val", "self.clip_gradients(opt, gradient_clip_val=1.0)")


@pytest.mark.parametrize("algorithm", ["l2", "Norm", 2])
def test_clip_algorithm_unknown(algorithm):
    def body(module, opt, batch):
        module.manual_backward(module.loss(batch))
        module.clip_gradients(opt, gradient_clip_val=1.0, gradient_clip_algorithm=algorithm)

    refused(ConfigurationError, body, "'norm' or 'value'", repr(algorithm), "gradient_clip_algorithm='norm'")


def test_clip_a_stranger():
    def body(module, opt, batch):
        module.clip_gradients(torch.optim.Adam(net().parameters()), 1.0)

    refused(ConfigurationError, body, "returned by configure_optimizers", "Adam", "self.optimizers()")


# ---------------------------------------------------------------- orders


def clip_after_step(module, opt, batch):
    module.manual_backward(module.loss(batch))
    opt.step()
    module.clip_gradients(opt, 1.0)


@pytest.mark.parametrize("options", [{}, SCALED], ids=["32-true", "16-mixed"])
def test_clip_after_step(options):
    parts = ("optimizer 0 (SGD)", "clip_gradients before step", "already stepped", "self.manual_backward(loss)")
    refused(ProtocolError, clip_after_step, *parts, **options)


def test_closure_that_cannot_be_called():
    def body(module, opt, batch):
        opt.step(closure=5)

    refused(ConfigurationError, body, "a closure that can be called", "5", "opt.step(closure)")


def test_manual_backward_in_automatic_optimization():
    class Mixed(Automatic):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            return loss

    with pytest.raises(ProtocolError) as caught:
        trained(module=Mixed())
    says(caught.value, "manual_backward() in manual optimization only", "self.automatic_optimization = False")


def raw_step(module, opt, batch):
    module.manual_backward(module.loss(batch))
    opt.optimizer.step()


def direct_backward(module, opt, batch):
    module.loss(batch).backward()
    opt.step()


def edited(module, opt, batch):
    module.manual_backward(module.loss(batch))
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    opt.step()


def replaced(module, opt, batch):
    module.manual_backward(module.loss(batch))
    for p in module.parameters():
        p.grad = p.grad.clone()
    opt.step()


def written_by_hand(module, opt, batch):
    opt.zero_grad()
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    opt.finalize()


def direct_backward_and_raw_step(module, opt, batch):
    module.loss(batch).backward()
    opt.optimizer.step()


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        (raw_step, ("a step of the raw optimizer 0 (SGD)", "the loss scale", "opt = self.optimizers(); opt.step()")),
        (direct_backward, ("loss.backward()?", "the loss scale", "self.manual_backward(loss)")),
        (direct_backward_and_raw_step, ("the loss scale",)),
        (
            edited,
            ("changed before (torch's clip_grad_norm_", "the loss scale", "self.clip_gradients(opt", "finalize()"),
        ),
        (replaced, ("changed before", "the loss scale")),
        (written_by_hand, ("came from elsewhere", "the loss scale")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bypass_under_a_loss_scaler(body, parts):
    refused(ProtocolError, body, *parts, **SCALED)


def failing_closure(module, opt, batch):
    def closure():
        opt.zero_grad()
        module.manual_backward(module.loss(batch))
        raise KeyError("on purpose")

    opt.step(closure)


def closure_of_a_step_that_fails(module, opt, batch):
    def closure():
        opt.zero_grad()
        module.manual_backward(module.loss(batch))

    with failing_step(opt):
        opt.step(closure)


def step_that_fails(module, opt, batch):
    module.manual_backward(module.loss(batch))
    with failing_step(opt):
        opt.step()


@contextmanager
def failing_step(opt):
    """Let torch's step raise, after xtrain has let it begin."""

    def fail(*_):
        raise KeyError("on purpose")

    handle = opt.optimizer.register_step_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("step", [failing_closure, closure_of_a_step_that_fails, step_that_fails])
def test_raw_step_is_still_refused_after_a_step_that_failed(step):
    def body(module, opt, batch):
        with pytest.raises(KeyError, match="on purpose"):
            step(module, opt, batch)
        opt.zero_grad()
        raw_step(module, opt, batch)

    refused(ProtocolError, body, "a step of the raw optimizer 0 (SGD)", "the loss scale", **SCALED)


def test_direct_backward_is_still_refused_after_a_backward_that_failed():
    def body(module, opt, batch):
        loss = module.loss(batch)
        module.manual_backward(loss)
        with pytest.raises(RuntimeError, match="second time"):
            module.manual_backward(loss)
        module.loss(batch).backward()

    refused(ProtocolError, body, "the loss scale", **SCALED)


def test_bypass_that_loses_nothing_trains_right_and_warns_once_at_most():
    reference = net()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for batch in loader():
        optimizer.zero_grad()
        reference(batch).pow(2).mean().backward()
        optimizer.step()

    def direct(module, opt, batch):
        opt.zero_grad()
        direct_backward(module, opt, batch)

    def raw(module, opt, batch):
        opt.zero_grad()
        raw_step(module, opt, batch)

    for body, warned in ((direct, 1), (raw, 0)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module, _ = trained(module=Doing(body))
        assert len(caught) == warned
        assert_equal(module.net, reference)


def change_between(module, opt, batch, step):
    hidden = nn.functional.linear(module.net(batch), module.net.weight.t()).pow(2)
    first, second = hidden.mean(), hidden.sum()
    module.manual_backward(first, retain_graph=True)
    step()
    module.manual_backward(second)


def test_step_before_the_other_backward():
    def body(module, opt, batch):
        change_between(module, opt, batch, opt.step)

    parts = ("every backward before a step", "modified by an inplace operation", "opt_a.step(); opt_b.step()")
    refused(ProtocolError, body, *parts)


def test_other_changes_in_place_keep_torchs_error():
    def body(module, opt, batch):
        change_between(module, opt, batch, torch.no_grad()(lambda: module.net.weight.mul_(1.0)))

    with pytest.raises(RuntimeError, match=r"^one of") as caught:
        trained(module=Doing(body))
    assert not isinstance(caught.value, ProtocolError)


# ---------------------------------------------------------------- the optimizer's own step and methods


class Own(torch.optim.SGD):
    """Steps that take an argument, and half-steps, as of SAM."""

    def step(self, closure=None, *, times=1):
        for _ in range(times):
            super().step(closure)

    @torch.no_grad()
    def half_step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=0.5 * group["lr"])

    def look(self):
        return len(self.param_groups)


class WithOwn(Doing):
    def configure_optimizers(self):
        return Own(self.parameters(), lr=0.1)


def by_hand(times):
    reference = net()
    for batch in loader():
        for parameter, grad in zip(reference.parameters(), gradients(reference, batch), strict=True):
            parameter.data.sub_(grad, alpha=0.1 * times)
    return reference


def gradients(layer, batch):
    return torch.autograd.grad(layer(batch).pow(2).mean(), list(layer.parameters()))


@pytest.mark.parametrize("options", [{}, SCALED], ids=["32-true", "16-mixed"])
def test_keyword_arguments_reach_the_optimizers_own_step(options):
    def body(module, opt, batch):
        opt.zero_grad()
        module.manual_backward(module.loss(batch).float())
        assert opt.step(times=3) is True

    module, _ = trained(module=WithOwn(body), **options)
    assert_equal(module.net, by_hand(3), 1e-2 if options else 1e-6)


def test_half_steps_train_and_count_where_nothing_is_lost():
    def body(module, opt, batch):
        opt.zero_grad()
        module.manual_backward(module.loss(batch))
        assert opt.look() == 1
        opt.half_step()

    module, run = trained(module=WithOwn(body))
    assert_equal(module.net, by_hand(0.5))
    assert run.global_step == 4


@pytest.mark.parametrize("finalized", [True, False])
def test_half_steps_are_refused_under_a_loss_scale(finalized):
    def body(module, opt, batch):
        opt.zero_grad()
        assert opt.look() == 1  # no gradients, no question
        module.manual_backward(module.loss(batch))
        if finalized:
            opt.finalize()
        opt.half_step()

    with pytest.raises(ProtocolError) as caught:
        trained(module=WithOwn(body), **SCALED)
    says(caught.value, "opt.half_step(...)", "the loss scale", "one process without a loss scale")


def test_an_edit_after_finalize_is_what_steps():
    def body(module, opt, batch):
        opt.zero_grad()
        module.manual_backward(module.loss(batch).float())
        assert opt.finalize() is True
        for parameter in module.parameters():
            parameter.grad.mul_(3)
        opt.step()

    module, _ = trained(module=Doing(body), **SCALED)
    assert_equal(module.net, by_hand(3), 1e-2)


def test_dropping_a_gradient_is_no_edit():
    def body(module, opt, batch):
        opt.zero_grad()
        module.manual_backward(module.loss(batch))
        module.net.bias.grad = None
        assert opt.step() is True

    module, _ = trained(module=Doing(body), **SCALED)
    assert torch.equal(module.net.bias, net().bias)
