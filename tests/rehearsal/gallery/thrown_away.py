"""Gradients for the second are made and dropped."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH = "8x4"


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 1)

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.01) for net in (self.one, self.two)]

    def training_step(self, batch, batch_idx):
        opt_one, opt_two = self.optimizers()
        opt_two.zero_grad()
        self.manual_backward(self.two(self.one(batch).detach()).square().mean())
        opt_two.step()
        opt_one.zero_grad()
        self.manual_backward(-self.two(self.one(batch)).mean())  # planted: XT-PROTOCOL-10
        opt_one.step()
