"""A layer that the loss needs is in no optimizer."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH = "8x4"


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.body = nn.Linear(4, 8)  # planted: XT-MODULE-03
        self.net = nn.Sequential(self.body, nn.ReLU(), nn.Linear(8, 1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[2].parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.net(batch).square().mean())
        opt.step()
