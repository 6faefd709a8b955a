"""A GAN with schedulers, clipping, spectators of each kind, and a generator that steps every third batch."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH = "16x8"
CHECKS = ("graphs",)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 8))
        self.discriminator = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

    def configure_optimizers(self):
        opts = [torch.optim.Adam(net.parameters(), lr=1e-3) for net in (self.generator, self.discriminator)]
        return opts, [torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.99**step) for opt in opts]

    def training_step(self, real, batch_idx):
        opt_g, opt_d = self.optimizers()
        fake = self.generator(torch.randn(len(real), 4, device=self.device))
        weight = min(1.0, 0.1 + 0.05 * batch_idx)
        loss_d = self.discriminator(fake.detach()).mean() - self.discriminator(real).mean()
        opt_d.zero_grad()
        self.manual_backward(loss_d * weight)
        self.log("norm", self.clip_gradients(opt_d, gradient_clip_val=1.0))
        opt_d.step()
        if batch_idx % 3 == 0:
            with self.toggled_optimizer(opt_g):
                loss_g = -self.discriminator(fake).mean()
                opt_g.zero_grad()
                self.manual_backward(loss_g)
                opt_g.step()
                self.log("loss_g", loss_g)
        for scheduler in self.lr_schedulers():
            scheduler.step()
