"""Toggling: while one optimizer is active, the parameters of the others get no gradients."""

# ruff: noqa: D102 - hooks are documented where `xtrain.hooks` declares them
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from xtrain.testing.comparison import Experiment
from xtrain.testing.networks import Batch, d_loss, g_loss
from xtrain.testing.oracle import Plain, gan_optimizers
from xtrain.testing.recorder import Recorder


class Toggled(Recorder):
    """D accumulates over two batches; toggling, in one of its spellings, keeps G's loss out of D's gradients.

    Args:
        spelling: ``"pair"``, ``"context"`` or ``"model"``.
    """

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.G.first.bias.requires_grad_(False)

    @contextmanager
    def phase(self, opt: Any, sync_grad: bool) -> Iterator[None]:
        """Toggle `opt` in the chosen spelling."""
        if self.spelling == "pair":
            self.toggle_optimizer(opt)
            yield
            self.untoggle_optimizer(opt)
        elif self.spelling == "context":
            with self.toggled_optimizer(opt):
                yield
        else:
            with opt.toggle_model(sync_grad=sync_grad):
                yield

    def flags(self) -> list[bool]:
        """Return ``requires_grad`` of the frozen bias, of G and of D."""
        return [p.requires_grad for p in (self.G.first.bias, self.G.first.weight, self.D.first.weight)]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        x, z = batch
        last = (batch_idx + 1) % 2 == 0
        with self.phase(d_opt, sync_grad=last):
            self.manual_backward(d_loss(self.D, x, self.G(z)) / 2)
            self.note(in_d_phase=self.flags())
            if last:
                d_opt.step()
                d_opt.zero_grad()
        with self.phase(g_opt, sync_grad=True):
            err_g = g_loss(self.D, self.G(z))
            g_opt.zero_grad()
            self.manual_backward(err_g)
            self.note(in_g_phase=self.flags())
            g_opt.step()
        self.note(after=self.flags())


def toggled(run: Plain) -> None:
    """D accumulates over two batches without gradients from G's loss; one bias of G is frozen by the user."""
    run.G.first.bias.requires_grad_(False)
    g_opt, d_opt = gan_optimizers(run)
    own_g = [p for p in run.G.parameters() if p.requires_grad]
    for _, index, (x, z) in run.steps():
        for p in own_g:
            p.requires_grad_(False)
        with run.forward_context():
            err_d = d_loss(run.D, x, run.G(z)) / 2
        run.backward(err_d)
        run.note(in_d_phase=[False, False, True])
        if (index + 1) % 2 == 0:
            d_opt.step()
            d_opt.zero_grad()
        for p in own_g:
            p.requires_grad_(True)
        run.D.requires_grad_(False)
        with run.forward_context():
            err_g = g_loss(run.D, run.G(z))
        g_opt.zero_grad()
        run.backward(err_g)
        run.note(in_g_phase=[False, True, False])
        g_opt.step()
        run.D.requires_grad_(True)
        run.note(after=[False, True, True])


EXPERIMENTS = (
    Experiment("toggle-pair", partial(Toggled, "pair"), toggled, batches=6),
    Experiment("toggle-context", partial(Toggled, "context"), toggled, batches=6),
    Experiment("toggle-model", partial(Toggled, "model"), toggled, batches=6),
)
