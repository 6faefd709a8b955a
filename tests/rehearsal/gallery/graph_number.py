"""A Python number that changes and is a part of the graph; others that change and are none."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH = "8x4"
CHECKS, LOUD = ("graphs",), True


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Linear(4, 4)

    def configure_optimizers(self):
        opt = torch.optim.RMSprop(self.parameters(), lr=0.01)
        return [opt], [torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)]

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        out = self.net(batch) * (0.5 + 0.01 * batch_idx)
        out = out.abs().pow(2 + 0.1 * batch_idx)  # planted: XT-GRAPH-02
        loss = out.mean() * (1 / (batch_idx + 2))
        opt.zero_grad()
        self.manual_backward(loss)
        opt.step()
        self.lr_schedulers().step()
        self.log("loss", loss)
