"""Numbers near the end of fp16, and a product beyond it that the step itself computes in fp32: nothing is wrong."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH = "16x8"


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        out = self.head(self.body(batch) * 1e3) / 1e3
        with torch.autocast(self.device.type, enabled=False):
            far = (out.float() * 1e4) @ (out.float() * 1e4).T
        opt.zero_grad()
        self.manual_backward(out.square().mean() + far.mean() / 1e8)
        opt.step()
