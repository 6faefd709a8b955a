"""Updates that are too small for parameters in bf16."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH = "16x8"


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Linear(8, 4)  # planted: XT-RANGE-03

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-6)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.net(batch).square().mean())
        opt.step()
