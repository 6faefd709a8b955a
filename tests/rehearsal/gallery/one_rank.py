"""A penalty that the first process alone has."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH, TARGETS, CHECKS = "8x4,8x1", ("processes",), ("agreement",)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        if self.trainer.is_global_zero:
            loss = loss + 0.1 * self.net.weight.square().sum()  # planted: XT-AGREE-03
        return loss
