"""A running mean of what one process has seen."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH, DEVICES = "8x4", 2


class Model(LightningModule):  # planted: XT-MODULE-02
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Linear(4, 1)
        self.register_buffer("mean", torch.zeros(4))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        self.mean.lerp_(batch.mean(0), 0.1)
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.net(batch).square().mean())
        opt.step()
