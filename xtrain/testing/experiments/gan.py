"""The specification's GAN and its relatives: two networks, two optimizers, one loss or two."""

# ruff: noqa: D102 - hooks are documented where `xtrain.hooks` declares them
from __future__ import annotations

from typing import Any

import torch

from xtrain.testing.comparison import Experiment
from xtrain.testing.networks import Batch, d_loss, g_loss, regression
from xtrain.testing.oracle import Clip, Plain, clip_norm, gan_optimizers
from xtrain.testing.recorder import Recorder


class Gan(Recorder):
    """The specification's GAN, in its order, without any toggle."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        x, z = batch
        fake = self.G(z)
        err_d = d_loss(self.D, x, fake)
        d_opt.zero_grad()
        self.manual_backward(err_d)
        self.before_step(d_opt, "d_norm")
        d_opt.step()
        err_g = g_loss(self.D, fake)
        g_opt.zero_grad()
        self.manual_backward(err_g)
        self.before_step(g_opt, "g_norm")
        g_opt.step()
        self.log_dict({"g_loss": err_g, "d_loss": err_d}, prog_bar=True)

    def before_step(self, opt: Any, name: str) -> None:
        """Do nothing: the specification's GAN does not clip."""


def gan(run: Plain, clip: Clip | None = None) -> None:
    """The GAN of the specification; the generator's loss also leaves gradients in D."""
    g_opt, d_opt = gan_optimizers(run)
    for _, _, (x, z) in run.steps():
        with run.forward_context():
            fake = run.G(z)
            err_d = d_loss(run.D, x, fake)
        d_opt.zero_grad()
        run.backward(err_d)
        if clip is not None:
            run.note(d_norm=clip(list(run.D.parameters())))
        d_opt.step()
        with run.forward_context():
            err_g = g_loss(run.D, fake)
        g_opt.zero_grad()
        run.backward(err_g)
        if clip is not None:
            run.note(g_norm=clip(list(run.G.parameters())))
        g_opt.step()


class Frequencies(Recorder):
    """The discriminator steps every other batch, the generator every batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        x, z = batch
        fake = self.G(z)
        d_opt.zero_grad()
        self.manual_backward(d_loss(self.D, x, fake))
        if (batch_idx + 1) % 2 == 0:
            d_opt.step()
        g_opt.zero_grad()
        self.manual_backward(g_loss(self.D, fake))
        g_opt.step()


def frequencies(run: Plain) -> None:
    """The discriminator steps every other batch, the generator every batch."""
    g_opt, d_opt = gan_optimizers(run)
    for _, index, (x, z) in run.steps():
        with run.forward_context():
            fake = run.G(z)
            err_d = d_loss(run.D, x, fake)
        d_opt.zero_grad()
        run.backward(err_d)
        if (index + 1) % 2 == 0:
            d_opt.step()
        with run.forward_context():
            err_g = g_loss(run.D, fake)
        g_opt.zero_grad()
        run.backward(err_g)
        g_opt.step()


class NCritic(Recorder):
    """Three clipped steps of D, then one of G, inside every training step."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        x, z = batch
        for k in (1, 2, 3):
            err_d = d_loss(self.D, x * k, self.G(z))
            d_opt.zero_grad()
            self.manual_backward(err_d)
            self.note(norm=self.clip(d_opt))
            d_opt.step()
        g_opt.zero_grad()
        self.manual_backward(g_loss(self.D, self.G(z)))
        g_opt.step()


def n_critic(run: Plain) -> None:
    """Three clipped steps of D, then one of G, inside every training step."""
    g_opt, d_opt = gan_optimizers(run)
    for _, _, (x, z) in run.steps():
        for k in (1, 2, 3):
            with run.forward_context():
                err_d = d_loss(run.D, x * k, run.G(z))
            d_opt.zero_grad()
            run.backward(err_d)
            run.note(norm=clip_norm(list(run.D.parameters())))
            d_opt.step()
        with run.forward_context():
            err_g = g_loss(run.D, run.G(z))
        g_opt.zero_grad()
        run.backward(err_g)
        g_opt.step()


class SharedLoss(Recorder):
    """One backward feeds both optimizers; only D is clipped."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        _, z = batch
        loss = regression(self.D, self.G(z), z)
        g_opt.zero_grad()
        d_opt.zero_grad()
        self.manual_backward(loss)
        self.note(norm=self.clip(d_opt))
        d_opt.step()
        g_opt.step()


def shared_loss(run: Plain) -> None:
    """One backward feeds both optimizers; only D is clipped."""
    g_opt, d_opt = gan_optimizers(run)
    for _, _, (_, z) in run.steps():
        with run.forward_context():
            loss = regression(run.D, run.G(z), z)
        g_opt.zero_grad()
        d_opt.zero_grad()
        run.backward(loss)
        run.note(norm=clip_norm(list(run.D.parameters())))
        d_opt.step()
        g_opt.step()


class NoLoader(Recorder):
    """The GAN with latents only, made without a loader: the step has no batch."""

    def training_step(self, batch: None, batch_idx: int) -> None:
        assert batch is None
        opts = self.optimizers()
        z = torch.full((4, 3), 0.25 * (batch_idx + 1), device=self.device, dtype=self.D.first.weight.dtype)
        for opt in opts:
            opt.zero_grad()
        self.manual_backward(regression(self.D, self.G(z), z))
        for opt in opts:
            opt.step()


def no_loader(run: Plain) -> None:
    """The training step makes its own data out of the index."""
    pair = gan_optimizers(run)
    for _, index, _ in run.steps():
        z = torch.full((4, 3), 0.25 * (index + 1), device=run.device, dtype=run.dtype)
        with run.forward_context():
            loss = regression(run.D, run.G(z), z)
        for opt in pair:
            opt.zero_grad()
        run.backward(loss)
        for opt in pair:
            opt.step()


EXPERIMENTS = (
    Experiment("gan", Gan, gan, epochs=2),
    Experiment("max-steps", Gan, gan, epochs=3, trainer={"max_steps": 6}),
    Experiment("frequencies", Frequencies, frequencies, batches=6),
    Experiment("n-critic", NCritic, n_critic),
    Experiment("shared-loss", SharedLoss, shared_loss),
    Experiment("no-loader", NoLoader, no_loader, loader=False),
    Experiment("no-loader-max-steps", NoLoader, no_loader, loader=False, trainer={"max_steps": 4}),
)
