"""Activations that grow until they are too large for fp16, in the second layer."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH = "16x8"


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.body = nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)  # planted: XT-RANGE-01
        self.scale = 1e6

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        out = self.head(self.body(batch) * self.scale)
        opt.zero_grad()
        self.manual_backward((out / self.scale).square().mean())
        opt.step()
