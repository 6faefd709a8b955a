"""A last batch of one sample, which batch statistics refuse."""

import torch
from torch import nn
from torch.utils.data import DataLoader

from xtrain import LightningModule


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()  # planted: XT-RUN-06

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader():
    return DataLoader(torch.randn(33, 4), batch_size=16, shuffle=True)  # planted: XT-DATA-05
