"""What manual optimization promises, sentence by sentence, against loops in plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from small import Small, assert_equal, loader, net, plain, rows, square, trained, trainer
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from xtrain import LightningModule, LightningOptimizer

# ---------------------------------------------------------------- minimal example and access


def test_minimal_example():
    module, _ = trained(max_epochs=2)

    def update(layer, optimizer, batch, index):
        optimizer.zero_grad()
        square(layer, batch).backward()
        optimizer.step()

    assert_equal(module.net, plain(update, epochs=2))


def test_your_own_optimizer():
    class Raw(Small):
        def training_step(self, batch, batch_idx):
            wrapped = self.optimizers()
            assert isinstance(wrapped, LightningOptimizer)
            assert wrapped.optimizer is self.made
            assert self.optimizers(use_pl_optimizer=False) is self.made
            assert wrapped.param_groups is self.made.param_groups
            assert wrapped.state is self.made.state
            wrapped.optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            wrapped.optimizer.step()

        def configure_optimizers(self):
            self.made = torch.optim.Adam(self.parameters(), lr=0.1)
            return self.made

    module, _ = trained(module=Raw())

    def update(layer, optimizer, batch, index):
        optimizer.zero_grad()
        square(layer, batch).backward()
        optimizer.step()

    assert_equal(module.net, plain(update, optimizer=lambda p: torch.optim.Adam(p, lr=0.1)))


def test_the_wrapper_answers_for_the_optimizer_it_wraps():
    _, run = trained()
    (wrapped,) = run.run.life.optimizers
    saved = copy.deepcopy(wrapped.state_dict())
    wrapped.param_groups[0]["lr"] = 0.7
    assert wrapped.optimizer.param_groups[0]["lr"] == 0.7
    wrapped.load_state_dict(saved)
    assert wrapped.param_groups[0]["lr"] == 0.1
    assert wrapped.defaults == wrapped.optimizer.defaults
    with pytest.raises(AttributeError, match="nonsense"):
        _ = wrapped.nonsense
    with pytest.raises(AttributeError, match="param_groups"):
        wrapped.param_groups = [{"params": [], "lr": 0.3}]


def test_arguments_of_backward_are_passed_on():
    class Extra(Small):
        def training_step(self, batch, batch_idx):
            opt = self.optimizers()
            opt.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss, retain_graph=True)
            self.manual_backward(loss, None, True, inputs=[self.net.weight])
            self.manual_backward(loss)
            opt.step()

    module, _ = trained(module=Extra())

    def update(layer, optimizer, batch, index):
        optimizer.zero_grad()
        square(layer, batch).backward()
        layer.weight.grad *= 3
        layer.bias.grad *= 2
        optimizer.step()

    assert_equal(module.net, plain(update))


# ---------------------------------------------------------------- accumulation and clipping


@pytest.mark.parametrize("every", [2, 3])
def test_gradient_accumulation(every):
    class Accumulating(Small):
        def training_step(self, batch, batch_idx):
            opt = self.optimizers()
            self.manual_backward(self.loss(batch) / every)
            if (batch_idx + 1) % every == 0:
                opt.step()
                opt.zero_grad()

    module, run = trained(loader(6), Accumulating())
    assert run.global_step == 6 // every

    def update(layer, optimizer, batch, index):
        (square(layer, batch) / every).backward()
        if (index + 1) % every == 0:
            optimizer.step()
            optimizer.zero_grad()

    assert_equal(module.net, plain(update, batches=6))


@pytest.mark.parametrize(("algorithm", "limit"), [("norm", 0.5), ("norm", 100.0), ("value", 0.1), (None, 0.5)])
def test_gradient_clipping(algorithm, limit):
    class Clipping(Small):
        def configure_gradient_clipping(self, *args, **kwargs):
            raise AssertionError("not called in manual optimization")

        def training_step(self, batch, batch_idx):
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(self.loss(batch))
            options = {} if algorithm is None else {"gradient_clip_algorithm": algorithm}
            self.seen.append(self.clip_gradients(opt, gradient_clip_val=limit, **options))
            opt.step()

    module, _ = trained(module=Clipping())
    norms = []

    def update(layer, optimizer, batch, index):
        optimizer.zero_grad()
        square(layer, batch).backward()
        norms.append(torch.cat([p.grad.flatten() for p in layer.parameters()]).norm())
        if algorithm == "value":
            nn.utils.clip_grad_value_(layer.parameters(), limit)
        else:
            nn.utils.clip_grad_norm_(layer.parameters(), limit)
        optimizer.step()

    assert_equal(module.net, plain(update))
    torch.testing.assert_close(torch.stack(module.seen), torch.stack(norms))


# ---------------------------------------------------------------- several optimizers


class GAN(LightningModule):
    """Generator and discriminator of one layer; noise comes from a generator of its own."""

    def __init__(self, toggle=False, every=1):
        super().__init__()
        self.automatic_optimization = False
        self.G, self.D = net(1), nn.Linear(1, 1)
        self.D.load_state_dict({"weight": torch.tensor([[0.5]]), "bias": torch.tensor([0.1])})
        self.noise = torch.Generator().manual_seed(3)
        self.toggle, self.every = toggle, every

    def errors(self, batch):
        fake = self.G(torch.randn(2, 3, generator=self.noise))
        real, other = torch.ones(2, 1), torch.zeros(2, 1)
        yield cross_entropy(self.D(batch[:, :1]), real) + cross_entropy(self.D(fake.detach()), other)
        yield cross_entropy(self.D(fake), real)

    def training_step(self, batch, batch_idx):
        g_opt, d_opt = self.optimizers()
        errors = self.errors(batch)
        d_opt.zero_grad()
        d_error = next(errors)
        self.manual_backward(d_error)
        if (batch_idx + 1) % self.every == 0:
            d_opt.step()
        if self.toggle:
            self.toggle_optimizer(g_opt)
        g_opt.zero_grad()
        g_error = next(errors)
        self.manual_backward(g_error)
        g_opt.step()
        if self.toggle:
            self.untoggle_optimizer(g_opt)
        self.log_dict({"g_loss": g_error, "d_loss": d_error}, prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.G.parameters(), lr=1e-2), torch.optim.Adam(self.D.parameters(), lr=1e-2)


def plain_gan(every=1, epochs=1):
    module = GAN()
    g_opt, d_opt = module.configure_optimizers()
    for _ in range(epochs):
        for index, batch in enumerate(loader()):
            errors = module.errors(batch)
            d_opt.zero_grad()
            d_error = next(errors)
            d_error.backward()
            if (index + 1) % every == 0:
                d_opt.step()
            g_opt.zero_grad()
            g_error = next(errors)
            g_error.backward()
            g_opt.step()
    return module, {"g_loss": g_error.item(), "d_loss": d_error.item()}


@pytest.mark.parametrize("toggle", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_gan_also_at_different_frequencies(toggle, every):
    module, run = trained(module=GAN(toggle, every), max_epochs=2)
    reference, losses = plain_gan(every, epochs=2)
    assert_equal(module, reference)
    assert {name: value.item() for name, value in run.callback_metrics.items()} == pytest.approx(losses)
    g_opt, d_opt = run.run.life.optimizers
    assert (g_opt.step_count, d_opt.step_count) == (8, 8 // every)


# ---------------------------------------------------------------- surroundings


def test_device_and_trainer_are_at_hand():
    class Asking(Small):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            assert self.trainer is run
            assert self.device == batch.device == torch.device("cpu")

    run = trainer()
    run.fit(Asking(), [rows(2)])
