"""Toggling restores exactly what was there: after exceptions, when nested, and in any order."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import Small, assert_equal, loader, net, rows, says, trained, trainer
from torch import nn

from xtrain import ConfigurationError, LightningModule, ProtocolError


class Three(LightningModule):
    """Three optimizers; the second also holds a layer of the first; one parameter is frozen, one belongs to nobody."""

    def __init__(self, body=None):
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b, self.c = (nn.Linear(2, 2) for _ in range(3))
        self.shared, self.free = nn.Linear(2, 2), nn.Linear(2, 2)
        self.b.bias.requires_grad_(False)
        self.body = body

    def configure_optimizers(self):
        groups = [self.a, self.shared], [self.b, self.shared], [self.c]
        return [torch.optim.SGD([p for m in group for p in m.parameters()], lr=0.1) for group in groups]

    def training_step(self, batch, batch_idx):
        self.body(self)

    def flags(self):
        return {name: parameter.requires_grad for name, parameter in self.named_parameters()}

    def trainable(self):
        """The parts that require gradients, as letters: 'b' is the weight only, its bias is frozen."""
        parts = ("a", "b", "c", "shared", "free")
        return "".join(part[0] for part in parts if getattr(self, part).weight.requires_grad)


def inside_a_step(body):
    module = Three(body)
    before = module.flags()
    trainer(limit_train_batches=1).fit(module, loader())
    assert module.flags() == before
    return module


@pytest.mark.parametrize(("index", "expected"), [(0, "asf"), (1, "bsf"), (2, "cf")])
@pytest.mark.parametrize("style", ["context", "model", "calls", "raw"])
def test_only_the_toggled_optimizer_trains(index, expected, style):
    def body(module):
        opt = module.optimizers()[index]
        before = module.flags()
        if style == "context":
            with module.toggled_optimizer(opt):
                found = module.trainable()
        elif style == "model":
            with opt.toggle_model():
                found = module.trainable()
        else:
            chosen = opt.optimizer if style == "raw" else opt
            module.toggle_optimizer(chosen)
            found = module.trainable()
            module.untoggle_optimizer(chosen)
        assert found == expected
        assert not module.b.bias.requires_grad
        assert module.flags() == before

    inside_a_step(body)


def test_nested_toggles_the_innermost_decides():
    def body(module):
        first, second, third = module.optimizers()
        with module.toggled_optimizer(first):
            with second.toggle_model():
                assert module.trainable() == "bsf"
                with module.toggled_optimizer(third):
                    assert module.trainable() == "cf"
                assert module.trainable() == "bsf"
            assert module.trainable() == "asf"
        assert module.trainable() == "abcsf"

    inside_a_step(body)


def test_toggles_may_end_in_another_order():
    def body(module):
        first, second, _ = module.optimizers()
        module.toggle_optimizer(first)
        module.toggle_optimizer(second)
        module.untoggle_optimizer(first)
        assert module.trainable() == "bsf"
        module.untoggle_optimizer(second)
        assert module.trainable() == "abcsf"

    inside_a_step(body)


@given(st.lists(st.integers(0, 2), max_size=5), st.booleans(), st.randoms(use_true_random=False))
def test_random_nesting_and_raises_restore_the_exact_map(order, fails, random):
    def body(module):
        before = module.flags()
        opts = module.optimizers()
        try:
            with ExitStack() as stack:
                for index in order:
                    stack.enter_context(random.choice([module.toggled_optimizer, LightningToggle])(opts[index]))
                    assert module.trainable() == ("asf", "bsf", "cf")[index]
                if fails:
                    raise KeyError
        except KeyError:
            pass
        assert module.flags() == before

    inside_a_step(body)


def LightningToggle(opt):  # noqa: N802  # stands beside toggled_optimizer as another way to say it
    return opt.toggle_model()


@pytest.mark.parametrize("place", ["context", "forgotten"])
def test_exception_that_ends_the_run_restores(place):
    def body(module):
        opt = module.optimizers()[0]
        if place == "forgotten":
            module.toggle_optimizer(opt)
            raise KeyError("inside")
        with opt.toggle_model():
            raise KeyError("inside")

    module = Three(body)
    before = module.flags()
    with pytest.raises(KeyError, match="inside"):
        trainer().fit(module, loader())
    assert module.flags() == before


def test_forgotten_untoggle_is_restored_at_the_end_of_the_run():
    inside_a_step(lambda module: module.toggle_optimizer(module.optimizers()[0]))


def test_untoggle_what_is_not_toggled():
    def body(module):
        first, second, _ = module.optimizers()
        with module.toggled_optimizer(first), pytest.raises(ProtocolError) as caught:
            module.untoggle_optimizer(second)
        says(caught.value, "optimizer 1 (SGD)", "self.toggle_optimizer(opt)")

    inside_a_step(body)


def test_toggle_a_stranger():
    def body(module):
        with pytest.raises(ConfigurationError) as caught:
            module.toggle_optimizer(torch.optim.Adam(net().parameters()))
        says(caught.value, "Adam", "self.optimizers()")

    inside_a_step(body)


def test_toggle_outside_of_a_run():
    with pytest.raises(ProtocolError) as caught:
        Three().toggle_optimizer(None)
    says(caught.value, "toggle_optimizer")


def test_sync_grad_trains_the_same_in_one_process():
    class Accumulating(Small):
        def training_step(self, batch, batch_idx):
            opt = self.optimizers()
            with opt.toggle_model(sync_grad=batch_idx % 2 == 1):
                self.manual_backward(self.loss(batch) / 2)
            if batch_idx % 2:
                opt.step()
                opt.zero_grad()

    module, _ = trained(module=Accumulating())
    reference = net()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for index, batch in enumerate(loader()):
        (reference(batch).pow(2).mean() / 2).backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(module.net, reference)


def test_toggled_loss_gives_the_others_no_gradient():
    def body(module):
        first, _, _ = module.optimizers()
        with first.toggle_model():
            module.manual_backward(module.c(module.a(rows(2)[:, :2])).sum())
        assert module.a.weight.grad is not None
        assert module.c.weight.grad is None

    inside_a_step(body)
