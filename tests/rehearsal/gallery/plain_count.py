"""A weight that grows with a number that no checkpoint has."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH, CHECKS = "8x4", ("determinism",)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Linear(4, 1)
        self.count = 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        self.count += 1
        loss = self.net(batch).square().mean()
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(loss * min(1.0, self.count / 100))  # planted: XT-SEED-02
        opt.step()
