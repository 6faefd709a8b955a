"""`manual_backward`: its arguments, several losses, gradients of gradients, autocast."""

# ruff: noqa: D102 - hooks are documented where `xtrain.hooks` declares them
from __future__ import annotations

import torch

from xtrain.testing.comparison import Experiment
from xtrain.testing.networks import Batch, d_loss, g_loss, regression
from xtrain.testing.oracle import Plain, clip_norm, forward_regression, gan_optimizers, one_optimizer
from xtrain.testing.recorder import OneOptimizer, Recorder


class RetainGraph(OneOptimizer):
    """Two backwards through one graph."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        loss = self.loss(batch) / 2
        opt.zero_grad()
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(loss)
        opt.step()


def retain_graph(run: Plain) -> None:
    """Two backwards through one graph."""
    opt = one_optimizer(run)
    for _, _, batch in run.steps():
        loss = forward_regression(run, batch) / 2
        opt.zero_grad()
        run.backward(loss, retain_graph=True)
        run.backward(loss)
        opt.step()


class GradientArgument(OneOptimizer):
    """The loss is weighted by the gradient given to its backward, by position."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        loss = self.loss(batch)
        opt.zero_grad()
        self.manual_backward(loss, torch.full_like(loss, 0.5))
        opt.step()


def gradient_argument(run: Plain) -> None:
    """The loss is weighted by the gradient given to its backward."""
    opt = one_optimizer(run)
    for _, _, batch in run.steps():
        loss = forward_regression(run, batch)
        opt.zero_grad()
        run.backward(loss, gradient=torch.full_like(loss, 0.5))
        opt.step()


class InputsArgument(Recorder):
    """``inputs=`` keeps G's loss away from the gradients that D accumulates."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        x, z = batch
        fake = self.G(z)
        err_d, err_g = d_loss(self.D, x, fake) / 2, g_loss(self.D, fake)
        self.manual_backward(err_d)
        g_opt.zero_grad()
        self.manual_backward(err_g, inputs=list(self.G.parameters()))
        g_opt.step()
        if (batch_idx + 1) % 2 == 0:
            d_opt.step()
            d_opt.zero_grad()


def inputs_argument(run: Plain) -> None:
    """``inputs=`` keeps G's loss away from the gradients that D accumulates."""
    g_opt, d_opt = gan_optimizers(run)
    for _, index, (x, z) in run.steps():
        with run.forward_context():
            fake = run.G(z)
            err_d, err_g = d_loss(run.D, x, fake) / 2, g_loss(run.D, fake)
        run.backward(err_d)
        g_opt.zero_grad()
        run.backward(err_g, inputs=list(run.G.parameters()))
        g_opt.step()
        if (index + 1) % 2 == 0:
            d_opt.step()
            d_opt.zero_grad()


class SumOfLosses(OneOptimizer):
    """A backward per loss, one step for both."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        x, z = batch
        opt.zero_grad()
        for k in (1, 2):
            self.manual_backward(regression(self.D, x * k, z) / 2)
        self.note(norm=self.clip(opt))
        opt.step()


def sum_of_losses(run: Plain) -> None:
    """A backward per loss, one step for both."""
    opt = one_optimizer(run)
    for _, _, (x, z) in run.steps():
        opt.zero_grad()
        for k in (1, 2):
            with run.forward_context():
                loss = regression(run.D, x * k, z) / 2
            run.backward(loss)
        run.note(norm=clip_norm(list(run.D.parameters())))
        opt.step()


class GradientPenalty(OneOptimizer):
    """A loss that holds a gradient of its own: differentiated twice, as in WGAN-GP."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.D(x).sum(), x, create_graph=True)
        opt.zero_grad()
        self.manual_backward((slope.norm(dim=1) - 1.0).square().mean())
        opt.step()


def gradient_penalty(run: Plain) -> None:
    """A loss that holds a gradient of its own: differentiated twice, as in WGAN-GP."""
    opt = one_optimizer(run)
    for _, _, (x, _) in run.steps():
        x = x.clone().requires_grad_()
        with run.forward_context():
            score = run.D(x).sum()
            (slope,) = torch.autograd.grad(score, x, create_graph=True)
            loss = (slope.norm(dim=1) - 1.0).square().mean()
        opt.zero_grad()
        run.backward(loss)
        opt.step()


class NoGradFirst(OneOptimizer):
    """A forward without gradients comes before the one that trains: autocast must not remember its weights."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        x, z = batch
        with torch.no_grad():
            target = self.D(x).detach()
        opt.zero_grad()
        self.manual_backward(regression(self.D, x + target, z))
        opt.step()


def no_grad_first(run: Plain) -> None:
    """A forward without gradients comes before the one that trains, in the same step."""
    opt = one_optimizer(run)
    for _, _, (x, z) in run.steps():
        with torch.no_grad(), run.forward_context():
            target = run.D(x).detach()
        with run.forward_context():
            loss = regression(run.D, x + target, z)
        opt.zero_grad()
        run.backward(loss)
        opt.step()


EXPERIMENTS = (
    Experiment("retain-graph", RetainGraph, retain_graph),
    Experiment("gradient-argument", GradientArgument, gradient_argument),
    Experiment("inputs-argument", InputsArgument, inputs_argument),
    Experiment("sum-of-losses", SumOfLosses, sum_of_losses),
    Experiment("gradient-penalty", GradientPenalty, gradient_penalty, second_order=True),
    Experiment("no-grad-first", NoGradFirst, no_grad_first),
)
