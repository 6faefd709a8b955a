"""A crop that grows inside of the step, and a smaller last batch, which costs one graph."""

import torch
from torch import nn

from xtrain import LightningModule

CHECKS = ("graphs",)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Conv1d(1, 1, 3, padding=1)

    def training_step(self, batch, batch_idx):
        crop = batch[:, :, : 6 + 2 * batch_idx]  # planted: XT-GRAPH-01
        return self.net(crop).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader():
    return torch.utils.data.DataLoader(torch.randn(100, 1, 32), batch_size=8)  # planted: XT-GRAPH-01
