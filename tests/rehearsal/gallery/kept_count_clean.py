"""A plain number and a buffer that a checkpoint has, and numbers from generators that are seeded: nothing is wrong."""

import random
import time

import torch
from torch import nn
from torch.utils.data import DataLoader

from xtrain import LightningModule

CHECKS = ("determinism",)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.register_buffer("mean", torch.zeros(4))
        self.count = 0

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["count"] = self.count

    def on_load_checkpoint(self, checkpoint):
        self.count = checkpoint["count"]

    def training_step(self, batch, batch_idx):
        began = time.time()
        self.count += 1
        self.mean.lerp_(batch.mean(0), 0.1)
        noise = torch.randn_like(batch) * random.uniform(0.5, 1.5)
        loss = self.net(batch - self.mean + noise).square().mean()
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(loss * min(1.0, self.count / 100))
        opt.step()
        self.log("seconds", time.time() - began)


def loader():
    return DataLoader(torch.randn(24, 4), batch_size=8, shuffle=True)
