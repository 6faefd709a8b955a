"""What inductor makes of a step and of networks: few cases, since each takes it some ten seconds."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from fresh import fresh
from small import says
from torch import nn
from xtrain_backends.cpu import CPU

from xtrain import LightningModule, Trainer, UnsupportedCombinationError
from xtrain.collectives import Collectives
from xtrain.compiled.networks import networks_of
from xtrain.contract import Situation
from xtrain.precision import PRECISIONS
from xtrain.rules import RULES


class Gan(LightningModule):
    """A tiny GAN: dropout, batch norm, noise drawn in the step, D steps twice as often as G, schedules."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.G = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
            self.D = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Dropout(0.2), nn.Linear(8, 1))
        self.losses = []

    def configure_optimizers(self):
        pair = [torch.optim.Adam(net.parameters(), lr=0.01, betas=(0.5, 0.9), eps=1e-4) for net in (self.G, self.D)]
        return pair, [torch.optim.lr_scheduler.ExponentialLR(opt, 0.95) for opt in pair]

    def training_step(self, batch, batch_idx):
        g_opt, d_opt = self.optimizers()
        noise = torch.rand(len(batch), 4) + torch.randn(len(batch), 4)
        with self.toggled_optimizer(d_opt):
            real, fake = self.D(batch), self.D(self.G(noise).detach())
            d_loss = nn.functional.softplus(-real).mean() + nn.functional.softplus(fake).mean()
            d_opt.zero_grad()
            self.manual_backward(d_loss)
            self.clip_gradients(d_opt, gradient_clip_val=0.5)
            d_opt.step()
        with self.toggled_optimizer(g_opt):
            g_loss = nn.functional.softplus(-self.D(self.G(noise))).mean()
            g_opt.zero_grad()
            self.manual_backward(g_loss)
            g_opt.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.log_dict({"g": g_loss, "d": d_loss})
        return {"loss": g_loss + d_loss}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def data(batches=12):
    return list(torch.randn(batches, 8, 6, generator=torch.Generator().manual_seed(3)).unbind())


def train(compile, epochs=2):
    torch.set_num_threads(1)
    torch.manual_seed(7)
    module = Gan()
    trainer = Trainer("cpu", max_epochs=epochs, enable_progress_bar=False, compile=compile)
    trainer.fit(module, data())
    return module, trainer


def step_by_inductor():
    """Return losses without and with a compiler, and how many steps were replayed; in a process of its own."""
    plain, _ = train(None)
    compiled, trainer = train("require")
    return plain.losses, compiled.losses, trainer.compiled_step.replays, trainer.compiled_step.compilations


@pytest.mark.timeout(600)
def test_a_step_compiled_by_inductor_draws_the_same_numbers_and_trains_the_same(tmp_path):
    losses, received, replays, compilations = fresh(
        step_by_inductor, timeout=500, TORCHINDUCTOR_COMPILE_THREADS="1", TORCHINDUCTOR_CACHE_DIR=str(tmp_path)
    )
    assert (replays > 5, compilations) == (True, 1)
    torch.testing.assert_close(torch.tensor(received), torch.tensor(losses), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- networks


def test_networks_are_the_outermost_modules_with_parameters_and_a_forward():
    module = nn.Module()
    module.a = nn.Sequential(nn.Linear(1, 1))
    module.b = nn.ModuleDict({"c": nn.Linear(1, 1), "d": nn.ModuleList([nn.Linear(1, 1)])})
    module.loss = nn.MSELoss()
    assert list(networks_of(module)) == [module.a, module.b["c"], module.b["d"][0]]


@pytest.fixture
def graphs(monkeypatch):
    """Let the compiler take graphs as they are, and count them."""
    seen = []

    def backend(gm, inputs):
        seen.append(gm)
        return gm.forward

    original = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function: original(function, backend=backend))
    return seen


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler looks at it
def test_networks_train_the_same_and_are_really_compiled(graphs):
    plain, _ = train(None)
    compiled, _ = train("networks")
    assert compiled.losses == plain.losses
    assert 2 <= len(graphs) <= 6
    assert all(net._compiled_call_impl is None for net in compiled.children())


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler looks at it
def test_a_copy_made_in_the_run_is_compiled_from_the_next_epoch_on_and_names_stay(graphs):
    class Copying(Gan):
        def on_train_start(self):
            self.average = copy.deepcopy(self.G)
            self.compiled = [net._compiled_call_impl is not None for net in self.children()]
            self.names = list(self.state_dict())

        def on_train_batch_start(self, batch, batch_idx):
            self.compiled = [net._compiled_call_impl is not None for net in self.children()]

    module = Copying()
    Trainer("cpu", max_epochs=1, enable_progress_bar=False, compile="networks").fit(module, data(2))
    assert module.compiled == [True] * 3
    assert set(Gan().state_dict()) <= set(module.names)
    assert all(name.split(".")[0] in ("G", "D", "average") for name in module.names)


# ---------------------------------------------------------------- rules about machine and launch


def test_without_a_compiler_it_is_refused_with_the_package(monkeypatch):
    monkeypatch.setenv("PATH", os.fspath(Path(__file__).parent))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UnsupportedCombinationError) as caught:
        train("networks")
    says_rule(caught.value, "[compile-compiler]", "g++")


def says_rule(error, *parts):
    for part in ("Received: ", "Fix:", *parts):
        assert part in str(error)


def test_several_processes_are_refused():
    class Two(Collectives):
        world_size = 2

    backend = CPU()
    backend.collectives = Two()
    (rule,) = [rule for rule in RULES if rule.id == "compile-processes"]
    assert rule.check(Situation(backend, PRECISIONS["32-true"], [], compile="step")) == "2 processes"
    assert rule.check(Situation(backend, PRECISIONS["32-true"], [], compile="networks")) is None


def test_nothing_else_is_understood():
    with pytest.raises(ValueError, match="compile") as caught:
        Trainer("cpu", compile="everything")
    says(caught.value, "'step'")
