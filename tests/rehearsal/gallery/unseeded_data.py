"""A dataset that augments with the system's own generator."""

import os

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from xtrain import LightningModule

CHECKS = ("determinism",)


class Noisy(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.full((4,), float(index)) + os.urandom(1)[0] / 256  # planted: XT-SEED-01


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def loader():
    return DataLoader(Noisy(), batch_size=8, shuffle=True)
