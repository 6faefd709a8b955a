"""What works on the CPU alone: a tensor of a TPU is no array of the host."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH = "8x4"
CHECKS = ("graphs",)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).square().mean()
        self.last = loss.detach().numpy()  # planted: XT-GRAPH-05
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)
