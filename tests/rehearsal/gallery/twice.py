"""Two workers read the whole stream each."""

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from xtrain import LightningModule


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Stream(IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        return iter(torch.randn(64, 4, generator=generator))


def loader():
    return DataLoader(Stream(), batch_size=8, num_workers=2)  # planted: XT-DATA-04
