"""A process that leaves out the step of an optimizer, for which the other one waits."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH, TARGETS, CHECKS = "8x4", ("processes",), ("agreement",)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 1)

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.one, self.other)]

    def training_step(self, batch, batch_idx):
        loss = self.other(self.one(batch)).square().mean()
        for number, opt in enumerate(self.optimizers()):
            opt.zero_grad()
            self.manual_backward(loss, retain_graph=True)
            if number == 0 or self.global_rank == batch_idx % 2:
                opt.step()  # planted: XT-AGREE-03
