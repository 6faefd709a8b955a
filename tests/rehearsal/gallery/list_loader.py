"""A list of batches is not split over processes."""

import torch
from torch import nn

from xtrain import LightningModule

DEVICES = 2
# planted: XT-DATA-02 at no line


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader():
    return [torch.randn(8, 4) for _ in range(8)]
