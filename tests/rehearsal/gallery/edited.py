"""torch clips gradients that are not averaged yet; the step that finds them is the line."""

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
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 0.01)
        opt.step()  # planted: XT-PROTOCOL-04
