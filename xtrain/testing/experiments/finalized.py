"""Gradients that are finalized, then read, edited, or added to: on every backend that keeps them in ``.grad``."""

# ruff: noqa: D102 - hooks are documented where `xtrain.hooks` declares them
from __future__ import annotations

from torch.nn.utils import clip_grad_norm_

from xtrain.testing.comparison import Experiment
from xtrain.testing.networks import Batch, d_loss, g_loss, regression
from xtrain.testing.oracle import Plain, clip_norm, forward_regression, gan_optimizers, one_optimizer
from xtrain.testing.recorder import OneOptimizer, Recorder


class ClipEachBackward(OneOptimizer):
    """Every micro-batch is clipped, with what came before: a backward adds to clipped gradients."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        x, z = batch
        opt.zero_grad()
        for part in (x, -x, 2 * x):
            self.manual_backward(regression(self.D, part, z))
            self.note(norm=self.clip(opt))
        self.manual_backward(regression(self.D, x, z))
        opt.step()


def clip_each_backward(run: Plain) -> None:
    """Clip the sum after each backward."""
    opt = one_optimizer(run)
    for _, _, (x, z) in run.steps():
        opt.zero_grad()
        for part in (x, -x, 2 * x):
            run.backward(forward_regression(run, (part, z)))
            run.note(norm=clip_norm(list(run.D.parameters())))
        run.backward(forward_regression(run, (x, z)))
        opt.step()


class StrayAfterClip(Recorder):
    """G's loss strays into the clipped gradients of D, which is stepped after G."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        x, z = batch
        fake = self.G(z)
        d_opt.zero_grad()
        self.manual_backward(d_loss(self.D, x, fake.detach()))
        self.note(norm=self.clip(d_opt))
        g_opt.zero_grad()
        self.manual_backward(g_loss(self.D, fake))
        g_opt.step()
        d_opt.step()


def stray_after_clip(run: Plain) -> None:
    """The sum is not clipped again."""
    g_opt, d_opt = gan_optimizers(run)
    for _, _, (x, z) in run.steps():
        with run.forward_context():
            fake = run.G(z)
            err_d, err_g = d_loss(run.D, x, fake.detach()), g_loss(run.D, fake)
        d_opt.zero_grad()
        run.backward(err_d)
        run.note(norm=clip_norm(list(run.D.parameters())))
        g_opt.zero_grad()
        run.backward(err_g)
        g_opt.step()
        d_opt.step()


class FinalizeThenEdit(OneOptimizer):
    """torch's own clipping, and an edit by hand, between ``opt.finalize()`` and the step."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        opt.zero_grad()
        self.note(nothing=opt.finalize())
        self.manual_backward(self.loss(batch))
        self.note(something=opt.finalize(), norm=clip_grad_norm_(self.D.parameters(), 0.2))
        self.D.last.weight.grad.mul_(0.5)  # type: ignore[union-attr]  # it is there
        opt.step()


def finalize_then_edit(run: Plain) -> None:
    """The same edits of ``.grad``."""
    opt = one_optimizer(run)
    for _, _, batch in run.steps():
        opt.zero_grad()
        run.backward(forward_regression(run, batch))
        run.note(nothing=False, something=True, norm=clip_grad_norm_(run.D.parameters(), 0.2))
        run.D.last.weight.grad.mul_(0.5)  # type: ignore[union-attr]  # it is there
        opt.step()


FINALIZED = (
    Experiment("clip-each-backward", ClipEachBackward, clip_each_backward),
    Experiment("stray-after-clip", StrayAfterClip, stray_after_clip),
    Experiment("finalize-then-edit", FinalizeThenEdit, finalize_then_edit),
)
