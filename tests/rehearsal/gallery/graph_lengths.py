"""Batches of many lengths."""

import torch
from torch import nn

from xtrain import LightningModule

CHECKS, LOUD = ("graphs",), True


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Conv1d(1, 1, 3, padding=1)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def collate(samples):
    length = 4 + int(samples[0])
    return torch.ones(len(samples), 1, length)


def loader():
    return torch.utils.data.DataLoader(range(80), batch_size=8, collate_fn=collate)  # planted: XT-GRAPH-01
