"""A loss that is a sum over the batch: with twice the processes it is half as large."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH, TARGETS, CHECKS = "8x4,8x1", ("processes",), ("agreement",)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        x, y = batch
        opt = self.optimizers()
        error = self.net(x + 0.1 * torch.randn_like(x)) - y
        loss = error.square().sum()  # planted: XT-AGREE-03
        opt.zero_grad()
        self.manual_backward(loss)
        opt.step()
