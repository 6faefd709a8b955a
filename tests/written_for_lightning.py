"""Modules as somebody wrote them for Lightning; `test_port.py` changes the import below and nothing else."""

from itertools import pairwise

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy


def mlp(*sizes):
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class GAN(LightningModule):
    """Two optimizers, one schedule per step and one per two epochs, toggling, logging."""

    def __init__(self, latent=2, lr=0.01):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator, self.discriminator = mlp(latent, 4, 3), mlp(3, 4, 1)

    def forward(self, z):
        return self.generator(z)

    def training_step(self, batch, batch_idx):
        g_opt, d_opt = self.optimizers()
        g_sch, d_sch = self.lr_schedulers()
        real = torch.ones(batch.size(0), 1, device=self.device)
        z = torch.sin(torch.arange(batch.size(0) * self.hparams.latent) + self.current_epoch + batch_idx)
        z = z.view(-1, self.hparams.latent).type_as(batch)

        self.toggle_optimizer(g_opt)
        g_loss = cross_entropy(self.discriminator(self(z)), real)
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        g_opt.step()
        g_opt.zero_grad()
        self.untoggle_optimizer(g_opt)

        with d_opt.toggle_model():
            d_loss = cross_entropy(self.discriminator(batch), real)
            d_loss = d_loss + cross_entropy(self.discriminator(self(z).detach()), 1 - real)
            self.log("d_loss", d_loss, prog_bar=True)
            d_opt.zero_grad()
            self.manual_backward(d_loss)
            self.clip_gradients(d_opt, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            d_opt.step()

        g_sch.step()
        if self.trainer.is_last_batch and (self.trainer.current_epoch + 1) % 2 == 0:
            d_sch.step()

    def configure_optimizers(self):
        g_opt = torch.optim.Adam(self.generator.parameters(), lr=self.hparams.lr, betas=(0.5, 0.999))
        d_opt = torch.optim.SGD(self.discriminator.parameters(), lr=self.hparams.lr, momentum=0.9)
        return (
            {"optimizer": g_opt, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(g_opt, 0.9)},
            {"optimizer": d_opt, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(d_opt, 1, 0.5)}},
        )


class Fit(LightningModule):
    """LBFGS with a closure."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.layer = mlp(3, 1)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()

        def closure():
            loss = (self.layer(batch) - batch.sum(1, keepdim=True)).pow(2).mean()
            opt.zero_grad()
            self.manual_backward(loss)
            return loss

        opt.step(closure=closure)

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=3)


class Accumulate(LightningModule):
    """One step per two batches, clipped by value; the schedule watches the epoch's loss."""

    def __init__(self, every=2):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.layer = mlp(3, 4, 1)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        loss = (self.layer(batch) - 1).pow(2).mean()
        self.log("loss", loss, on_step=False, on_epoch=True)
        self.manual_backward(loss / self.hparams.every)
        if (batch_idx + 1) % self.hparams.every == 0:
            self.clip_gradients(opt, gradient_clip_val=0.05, gradient_clip_algorithm="value")
            opt.step()
            opt.zero_grad()

    def on_train_epoch_end(self):
        self.lr_schedulers().step(self.trainer.callback_metrics["loss"])

    def configure_optimizers(self):
        opt = torch.optim.Adam(self.parameters(), lr=0.3)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0, threshold=0.5)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": plateau, "monitor": "loss"}}
