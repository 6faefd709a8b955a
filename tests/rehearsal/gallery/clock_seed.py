"""A generator whose seed is the time."""

import time

import torch
from torch import nn

from xtrain import LightningModule

BATCH, CHECKS = "8x4", ("determinism",)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Linear(4, 1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        generator = torch.Generator().manual_seed(time.time_ns())
        noise = torch.randn(batch.shape, generator=generator)  # planted: XT-SEED-01
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.net(batch + noise).square().mean())
        opt.step()
