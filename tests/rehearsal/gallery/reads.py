"""Numbers that the host asks for in every step, in three ways; others that cost nothing."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH = "8x4"


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Linear(4, 1)
        self.losses = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        loss = self.net(batch).square().mean()
        if loss > 100:  # planted: XT-SYNC-01
            return
        opt.zero_grad()
        self.manual_backward(loss)
        opt.step()
        self.log("loss", loss)
        self.losses.append(loss.item())  # planted: XT-SYNC-01
        if batch_idx == 0:
            print(float(loss))
