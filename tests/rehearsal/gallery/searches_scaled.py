"""LBFGS in a precision with a loss scale, which xtrain refuses."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH, TARGETS, CHECKS = "16x4", ("16-mixed",), ("agreement",)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Linear(4, 1)

    def configure_optimizers(self):  # planted: XT-AGREE-04
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()

        def closure():
            opt.zero_grad()
            loss = (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()
            self.manual_backward(loss)
            return loss

        opt.step(closure)
