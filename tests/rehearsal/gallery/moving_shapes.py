"""Shapes that depend on numbers."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH = "8x4,8:int3"


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Linear(4, 3)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        x, y = batch
        opt = self.optimizers()
        classes = y.unique()  # planted: XT-SYNC-02
        kept = self.net(x)[y > 0]  # planted: XT-SYNC-02
        repeated = torch.repeat_interleave(x, y, dim=0)  # planted: XT-SYNC-02
        loss = repeated.sum() + kept.sum() + self.net(x)[torch.arange(len(x)), y].mean() + classes.sum()
        opt.zero_grad()
        self.manual_backward(loss)
        opt.step()
