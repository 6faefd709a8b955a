"""Scores of an attention by hand that are divided too late."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH = "8x6x16"


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        query, key = 500 * self.query(batch), 500 * self.key(batch)
        scores = query @ key.transpose(1, 2)  # planted: XT-RANGE-01
        opt.zero_grad()
        self.manual_backward((scores / 500**2).square().mean())
        opt.step()
