"""One of two optimizers was forgotten."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH = "8x4"


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 1)

    def configure_optimizers(self):
        one = torch.optim.SGD(self.one.parameters(), lr=0.01)
        two = torch.optim.SGD(self.two.parameters(), lr=0.01)  # planted: XT-PROTOCOL-06
        return [one, two]

    def training_step(self, batch, batch_idx):
        opt_one, opt_two = self.optimizers()
        opt_one.zero_grad()
        opt_two.zero_grad()
        self.manual_backward(self.two(self.one(batch)).square().mean())
        opt_one.step()
