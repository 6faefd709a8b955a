"""A parameter that is read as an array, which it is not where it is divided, or on another device."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH, TARGETS, CHECKS = "8x4", ("fsdp",), ("agreement",)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        size = abs(self.net.weight.detach().numpy()).mean()  # planted: XT-AGREE-01
        return self.net(batch).square().mean() + float(size)
