"""What plain PyTorch gives one meaning to, however unusual: steps on nothing, on zeros, twice; clips of nothing."""

# ruff: noqa: D102 - hooks are documented where `xtrain.hooks` declares them
from __future__ import annotations

import warnings

import torch
from torch.nn.utils import get_total_norm

from xtrain.testing.comparison import Experiment
from xtrain.testing.networks import Batch, d_loss, g_loss
from xtrain.testing.oracle import Plain, clip_norm, forward_regression, gan_optimizers, one_optimizer
from xtrain.testing.recorder import OneOptimizer, Recorder

START = 2
"""The first batch in which D is trained."""


class ConditionalLoss(Recorder):
    """D's loss is a constant before `START`, as in a VQGAN: clipping and stepping D do nothing until then."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        x, z = batch
        fake = self.G(z)
        with self.toggled_optimizer(g_opt):
            self.manual_backward(g_loss(self.D, fake))
        g_opt.step()
        g_opt.zero_grad()
        d_opt.zero_grad()
        started = batch_idx >= START
        self.manual_backward(d_loss(self.D, x, fake) if started else torch.tensor(0.0, requires_grad=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is told once that D had nothing to step on
            self.note(norm=self.clip(d_opt), applied=d_opt.step())


def conditional_loss(run: Plain) -> None:
    """D is left alone before `START`."""
    g_opt, d_opt = gan_optimizers(run)
    for _, index, (x, z) in run.steps():
        with run.forward_context():
            fake = run.G(z)
            err_d, err_g = d_loss(run.D, x, fake.detach()), g_loss(run.D, fake)
        run.backward(err_g)
        g_opt.step()
        g_opt.zero_grad()
        d_opt.zero_grad()
        norm = torch.tensor(0.0)
        if index >= START:
            run.backward(err_d)
            norm = clip_norm(list(run.D.parameters()))
            d_opt.step()
        run.note(norm=norm, applied=index >= START)


class NeverReached(OneOptimizer):
    """No loss reaches the optimizer; the training steps count all the same."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        self.manual_backward(self.G(batch[1]).square().mean())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.note(applied=opt.step())


def never_reached(run: Plain) -> None:
    """Nothing happens, in steps that count."""
    one_optimizer(run)
    for _ in run.steps():
        run.idle_steps += 1
        run.note(applied=False)


class StepTwice(Recorder):
    """Two steps on the same gradients, with a backward of the other optimizer in between."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        x, z = batch
        fake = self.G(z)
        d_opt.zero_grad()
        self.manual_backward(d_loss(self.D, x, fake.detach()))
        d_opt.step()
        with self.toggled_optimizer(g_opt):
            self.manual_backward(self.G(z).square().mean())
        d_opt.step()
        g_opt.step()
        d_opt.step()


def step_twice(run: Plain) -> None:
    """Every step applies what is in ``.grad``; G's gradients accumulate."""
    g_opt, d_opt = gan_optimizers(run)
    for _, _, (x, z) in run.steps():
        with run.forward_context():
            fake = run.G(z)
            err_d, err_g = d_loss(run.D, x, fake.detach()), run.G(z).square().mean()
        d_opt.zero_grad()
        run.backward(err_d)
        d_opt.step()
        run.backward(err_g)
        d_opt.step()
        g_opt.step()
        d_opt.step()


class StepOnZeros(Recorder):
    """A step on gradients that were set to zero moves by momentum, as in PyTorch."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        x, z = batch
        fake = self.G(z)
        self.manual_backward(d_loss(self.D, x, fake) + g_loss(self.D, fake))
        for opt in (g_opt, d_opt):
            opt.step()
            opt.zero_grad(set_to_none=False)
            opt.step()
            opt.zero_grad()


def step_on_zeros(run: Plain) -> None:
    """Zeros are gradients."""
    g_opt, d_opt = gan_optimizers(run)
    for _, _, (x, z) in run.steps():
        with run.forward_context():
            fake = run.G(z)
            loss = d_loss(run.D, x, fake) + g_loss(run.D, fake)
        run.backward(loss)
        for opt in (g_opt, d_opt):
            opt.step()
            opt.zero_grad(set_to_none=False)
            opt.step()
            opt.zero_grad()


class MeasureNorms(OneOptimizer):
    """`clip_gradients` without a value measures; without gradients the norm is 0."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        opt.zero_grad()
        self.note(nothing=self.clip_gradients(opt))
        self.manual_backward(self.loss(batch))
        self.note(norm=self.clip_gradients(opt))
        opt.step()


def measure_norms(run: Plain) -> None:
    """Norms by torch."""
    opt = one_optimizer(run)
    for _, _, batch in run.steps():
        opt.zero_grad()
        run.backward(forward_regression(run, batch))
        norm = get_total_norm([p.grad for p in run.D.parameters() if p.grad is not None])
        run.note(nothing=0.0, norm=norm)
        opt.step()


EXPERIMENTS = (
    Experiment("conditional-loss", ConditionalLoss, conditional_loss, batches=5),
    Experiment("never-reached", NeverReached, never_reached, trainer={"max_steps": 2}),
    Experiment("step-twice", StepTwice, step_twice, batches=5),
    Experiment("step-on-zeros", StepOnZeros, step_on_zeros, batches=5),
    Experiment("measure-norms", MeasureNorms, measure_norms),
)
