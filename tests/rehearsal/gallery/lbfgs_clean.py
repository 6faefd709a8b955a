"""A closure that LBFGS evaluates several times: nothing is wrong."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH = "16x4"


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Linear(4, 1)

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()

        def closure():
            opt.zero_grad()
            loss = (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()
            self.manual_backward(loss)
            return loss

        opt.step(closure)
