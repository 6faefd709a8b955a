"""A running mean in an attribute that is no buffer."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH, CHECKS = "8x4", ("determinism",)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Linear(4, 1)
        self.mean = torch.zeros(4)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        self.mean = self.mean * 0.9 + batch.mean(0) * 0.1  # planted: XT-SEED-02
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.net(batch - self.mean).square().mean())
        opt.step()
