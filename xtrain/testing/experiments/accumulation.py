"""Gradient accumulation over several batches, and gradients that are kept or set to zero after a step."""

# ruff: noqa: D102 - hooks are documented where `xtrain.hooks` declares them
from __future__ import annotations

from xtrain.testing.comparison import Experiment
from xtrain.testing.networks import Batch, d_loss, g_loss
from xtrain.testing.oracle import Plain, clip_norm, forward_regression, gan_optimizers, one_optimizer
from xtrain.testing.recorder import OneOptimizer, Recorder


class Accumulate(OneOptimizer):
    """One optimizer that steps after every second batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if (batch_idx + 1) % 2 == 0:
            opt.step()
            opt.zero_grad()


def accumulate(run: Plain, every: int = 2) -> None:
    """One optimizer that steps after every N batches."""
    opt = one_optimizer(run)
    for _, index, batch in run.steps():
        run.backward(forward_regression(run, batch) / every)
        if (index + 1) % every == 0:
            opt.step()
            opt.zero_grad()


class AccumulateApart(Recorder):
    """G steps every second batch, D every third."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        x, z = batch
        fake = self.G(z)
        err_d, err_g = d_loss(self.D, x, fake) / 3, g_loss(self.D, fake) / 2
        self.manual_backward(err_d)
        self.manual_backward(err_g)
        if (batch_idx + 1) % 3 == 0:
            self.note(d_norm=self.clip(d_opt))
            d_opt.step()
            d_opt.zero_grad()
        if (batch_idx + 1) % 2 == 0:
            g_opt.step()
            g_opt.zero_grad()


def accumulate_apart(run: Plain) -> None:
    """G steps every second batch, D every third; what G's loss leaves in D counts, as in plain PyTorch."""
    g_opt, d_opt = gan_optimizers(run)
    for _, index, (x, z) in run.steps():
        with run.forward_context():
            fake = run.G(z)
            err_d, err_g = d_loss(run.D, x, fake) / 3, g_loss(run.D, fake) / 2
        run.backward(err_d)
        run.backward(err_g)
        if (index + 1) % 3 == 0:
            run.note(d_norm=clip_norm(list(run.D.parameters())))
            d_opt.step()
            d_opt.zero_grad()
        if (index + 1) % 2 == 0:
            g_opt.step()
            g_opt.zero_grad()


class KeepZeros(Recorder):
    """``zero_grad(set_to_none=False)`` leaves zeros, into which the next backward adds."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        x, z = batch
        for opt in (g_opt, d_opt):
            opt.zero_grad(set_to_none=False)
        fake = self.G(z)
        self.manual_backward(d_loss(self.D, x, fake) + g_loss(self.D, fake))
        g_opt.step()
        d_opt.step()
        d_opt.zero_grad(set_to_none=False)
        self.note(left=[p.grad.abs().sum() for p in self.D.parameters() if p.grad is not None])


def keep_zeros(run: Plain) -> None:
    """``zero_grad(set_to_none=False)``: G has zeros, not None, where its loss is left out, and still steps."""
    g_opt, d_opt = gan_optimizers(run)
    for _, _, (x, z) in run.steps():
        for opt in (g_opt, d_opt):
            opt.zero_grad(set_to_none=False)
        with run.forward_context():
            fake = run.G(z)
            loss = d_loss(run.D, x, fake) + g_loss(run.D, fake)
        run.backward(loss)
        g_opt.step()
        d_opt.step()
        d_opt.zero_grad(set_to_none=False)
        run.note(left=[p.grad.abs().sum() for p in run.D.parameters() if p.grad is not None])


class KeepGradients(OneOptimizer):
    """Gradients that are not zeroed after a step still count in the next one."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        if batch_idx % 3 == 0:
            opt.zero_grad()
        self.manual_backward(self.loss(batch) / 3)
        self.note(norm=self.clip(opt))
        opt.step()


def keep_gradients(run: Plain) -> None:
    """Gradients that are not zeroed after a step still count in the next one."""
    opt = one_optimizer(run)
    for _, index, batch in run.steps():
        if index % 3 == 0:
            opt.zero_grad()
        run.backward(forward_regression(run, batch) / 3)
        run.note(norm=clip_norm(list(run.D.parameters())))
        opt.step()


EXPERIMENTS = (
    Experiment("accumulate", Accumulate, accumulate, batches=6),
    Experiment("accumulate-apart", AccumulateApart, accumulate_apart, batches=6, epochs=2),
    Experiment("keep-zeros", KeepZeros, keep_zeros),
    Experiment("keep-gradients", KeepGradients, keep_gradients, batches=6),
)
