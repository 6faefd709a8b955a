"""Distances as differences of large squares, which bf16 does not have the digits for."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH, TARGETS, CHECKS = "32x32", ("bf16-mixed",), ("agreement",)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(40 + torch.randn(16, 32))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        x = batch + 40
        squares = x.square().sum(1, keepdim=True) + self.codes.square().sum(1)
        products = x @ self.codes.T
        distances = squares - 2 * products  # planted: XT-AGREE-02
        return distances.softmax(1).mul(distances).sum(1).mean()
