"""The second optimizer steps, but its parameters are cut off from the loss."""

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
        return [torch.optim.SGD(net.parameters(), lr=0.01) for net in (self.one, self.two)]

    def training_step(self, batch, batch_idx):
        opt_one, opt_two = self.optimizers()
        opt_one.zero_grad()
        opt_two.zero_grad()
        with torch.no_grad():
            target = self.two(batch)
        self.manual_backward((self.one(batch) - target).square().mean())
        opt_one.step()
        opt_two.step()  # planted: XT-PROTOCOL-05
