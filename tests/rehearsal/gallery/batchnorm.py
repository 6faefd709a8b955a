"""Batch statistics on eight processes: one finding, at the first layer, for all of them."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH, DEVICES = "8x4", 8


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(
            nn.Linear(4, 8),
            nn.BatchNorm1d(8),  # planted: XT-MODULE-01
            nn.Linear(8, 8),
            nn.BatchNorm1d(8),
            nn.Linear(8, 1),
        )

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.net(batch).square().mean())
        opt.step()
