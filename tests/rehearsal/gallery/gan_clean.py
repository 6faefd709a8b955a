"""The GAN of the README's kind, with toggles: nothing is wrong."""

import torch
from torch import nn
from torch.nn.functional import softplus

from xtrain import LightningModule

BATCH = "16x8"


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.discriminator = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), lr=1e-3) for net in (self.generator, self.discriminator)]

    def training_step(self, real, batch_idx):
        opt_g, opt_d = self.optimizers()
        fake = self.generator(torch.randn(len(real), 4, device=self.device))

        loss_d = (softplus(-self.discriminator(real)) + softplus(self.discriminator(fake.detach()))).mean()
        opt_d.zero_grad()
        self.manual_backward(loss_d)
        self.clip_gradients(opt_d, gradient_clip_val=1.0)
        opt_d.step()

        with self.toggled_optimizer(opt_g):
            loss_g = softplus(-self.discriminator(fake)).mean()
            opt_g.zero_grad()
            self.manual_backward(loss_g)
            opt_g.step()
