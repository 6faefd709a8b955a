"""Noise from the system's own generator, which no seed reaches."""

import random

import torch
from torch import nn

from xtrain import LightningModule

BATCH, CHECKS = "8x4", ("determinism",)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.random = random.SystemRandom()
        self.net = nn.Linear(4, 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        scale = self.random.uniform(0.5, 1.5)
        batch = batch * scale  # planted: XT-SEED-01
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.net(batch).square().mean())
        opt.step()
