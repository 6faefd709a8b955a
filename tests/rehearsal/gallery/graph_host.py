"""A value that is read within a step, operations that XLA lacks (of lgamma the backward, too), a growing loop."""

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
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        out = self.net(batch)
        loss = torch.hypot(out, batch).mean()  # planted: XT-GRAPH-04
        loss = loss + out[out > 0].mean()  # planted: XT-GRAPH-04
        loss = loss + out.exp().lgamma().mean()  # planted: XT-GRAPH-04
        for _ in range(batch_idx):
            loss = loss + out.tanh().mean()  # planted: XT-GRAPH-02
        if loss.item() > 100:  # planted: XT-GRAPH-03
            return
        opt.zero_grad()
        self.manual_backward(loss)
        opt.step()
