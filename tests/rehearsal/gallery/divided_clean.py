"""What is too large for one device fits when it is divided over eight: nothing is wrong."""

import torch
from torch import nn
from torch.utils.data import DataLoader

from xtrain import LightningModule

TARGETS, DEVICES, MEMORY, CHECKS = ("cuda", "fsdp"), 8, 40 * 2**20, ("memory",)


def loader():
    return DataLoader(torch.zeros(64, 1024), batch_size=16)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(4)])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.net(batch).square().mean())
        opt.step()
