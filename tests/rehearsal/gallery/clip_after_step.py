"""Clipped when it is too late."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH = "8x4"


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Linear(4, 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.net(batch).square().mean())
        opt.step()
        self.clip_gradients(opt, gradient_clip_val=1.0)  # planted: XT-PROTOCOL-01
