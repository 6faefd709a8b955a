"""Optimizers by name, a loss that reaches one of them alone, and several that share one loss."""

from __future__ import annotations

import pytest
import torch
from small import SCALED, Small, assert_equal, loader, says, trained
from torch import nn
from torch.optim.lr_scheduler import StepLR

from xtrain import ConfigurationError, LightningModule, ProtocolError
from xtrain.callbacks import LearningRateMonitor
from xtrain.loggers import CSVLogger


def layers(seed=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(3, 2), nn.Linear(2, 1)


class Pair(LightningModule):
    def __init__(self, form="dict"):
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = layers()
        self.form = form

    def configure_optimizers(self):
        generator = torch.optim.SGD(self.first.parameters(), lr=0.1)
        critic = torch.optim.Adam(self.second.parameters(), lr=0.01)
        if self.form == "dict":
            return {"generator": generator, "critic": critic}
        return {"generator": {"optimizer": generator, "lr_scheduler": StepLR(generator, 1)}, "critic": critic}

    def training_step(self, batch, batch_idx):
        generator, critic = self.optimizers()
        assert (generator.name, critic.name) == ("generator", "critic")
        for opt in (generator, critic):
            opt.zero_grad()
            opt.backward(self.second(self.first(batch)).square().mean())
            opt.step()


def by_hand():
    first, second = layers()
    optimizers = torch.optim.SGD(first.parameters(), lr=0.1), torch.optim.Adam(second.parameters(), lr=0.01)
    for batch in loader():
        for optimizer, layer in zip(optimizers, (first, second), strict=True):
            parameters = list(layer.parameters())
            loss = second(first(batch)).square().mean()
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            optimizer.step()
    return first, second


@pytest.mark.parametrize("form", ["dict", "dicts"])
def test_optimizers_answer_by_name(form):
    module, run = trained(module=Pair(form))
    assert module.optimizers()["critic"] is module.optimizers()[1]
    assert [repr(o) for o in module.optimizers()] == ["optimizer 'generator' (SGD)", "optimizer 'critic' (Adam)"]
    assert len(run.lr_scheduler_configs) == (form == "dicts")
    with pytest.raises(ConfigurationError) as caught:
        module.optimizers()["generator_1"]
    says(caught.value, "self.optimizers()['generator']")


def test_a_single_named_optimizer_answers_by_name_too():
    class One(Small):
        def training_step(self, batch, batch_idx):
            opt = self.optimizers()["only"]
            opt.zero_grad()
            self.manual_backward(self.loss(batch))
            opt.step()

        def configure_optimizers(self):
            return {"only": torch.optim.SGD(self.parameters(), lr=0.1)}

    assert_equal(trained(module=One())[0].net, trained()[0].net)


def test_what_is_no_optimizer_is_named_by_its_key():
    class Wrong(Small):
        def configure_optimizers(self):
            return {"generator": torch.optim.SGD(self.parameters(), lr=0.1), "critic": self.net}

    with pytest.raises(ConfigurationError) as caught:
        trained(module=Wrong())
    says(caught.value, "the dict's ['critic'] is Linear")


def test_learning_rates_have_the_names(tmp_path):
    _, run = trained(module=Pair(), callbacks=LearningRateMonitor(), logger=CSVLogger(tmp_path))
    assert {"lr-generator", "lr-critic"} <= run.callback_metrics.keys()


@pytest.mark.parametrize("options", [{}, SCALED], ids=["32-true", "16-mixed"])
def test_a_loss_reaches_one_optimizer_alone(options):
    module, _ = trained(module=Pair(), **options)
    tolerance = 1e-2 if options else 1e-6
    for ours, theirs in zip((module.first, module.second), by_hand(), strict=True):
        assert_equal(ours, theirs, tolerance)


def test_the_gradients_of_the_others_stay():
    class Keeps(Pair):
        def training_step(self, batch, batch_idx):
            generator, critic = self.optimizers()
            loss = self.second(self.first(batch)).square().mean()
            critic.backward(loss, retain_graph=True)
            before = self.second.weight.grad.clone()
            assert self.first.weight.grad is None
            generator.backward(loss)
            assert torch.equal(self.second.weight.grad, before)
            assert self.first.weight.grad is not None
            assert all(p.requires_grad for p in self.parameters())

    trained(loader(1), Keeps())


def test_automatic_optimization_calls_backward_itself():
    class Both(Small):
        def training_step(self, batch, batch_idx):
            self.optimizers().backward(self.loss(batch))

    module = Both()
    module.automatic_optimization = True
    with pytest.raises(ProtocolError) as caught:
        trained(module=module)
    says(caught.value, "opt.backward() in manual optimization only")


# ---------------------------------------------------------------- one loss, several optimizers


class Mixed(LightningModule):
    """A matrix for Muon, the rest for AdamW."""

    def __init__(self):
        super().__init__()
        self.first, self.second = layers()

    def configure_optimizers(self):
        return mixed(self.first, self.second)

    def training_step(self, batch, batch_idx):
        return 50 * self.second(self.first(batch)).square().mean()


def mixed(first, second):
    rest = [first.bias, second.weight, second.bias]
    return [torch.optim.Muon([first.weight], lr=0.1), torch.optim.AdamW(rest, lr=0.05)]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_muon_and_adamw_share_one_loss_and_one_clip(accumulate, clip):
    module, run = trained(module=Mixed(), accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    first, second = layers()
    optimizers = mixed(first, second)
    parameters = [*first.parameters(), *second.parameters()]
    for index, batch in enumerate(loader()):
        (50 * second(first(batch)).square().mean() / accumulate).backward()
        if (index + 1) % accumulate:
            continue
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(module.first, first, 1e-5)
    assert_equal(module.second, second, 1e-5)
    assert run.global_step == 4 // accumulate


def test_clipping_by_value_and_a_clipping_of_ones_own():
    class Own(Mixed):
        clipped = 0

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.clipped += 1
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    options = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    own, plain = trained(module=Own(), **options)[0], trained(module=Mixed(), **options)[0]
    assert own.clipped == 8
    assert_equal(own, plain)


def test_a_loss_scale_is_taken_off_once():
    module, _ = trained(module=Mixed(), gradient_clip_val=0.5, **SCALED)
    assert_equal(module, trained(module=Mixed(), gradient_clip_val=0.5)[0], 3e-2)
