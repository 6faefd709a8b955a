"""Tensors that leave the device in every step; metrics at the end of an epoch may."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH = "8x4"


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Linear(4, 1)
        self.seen = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        out = self.net(batch)
        opt.zero_grad()
        self.manual_backward(out.square().mean())
        opt.step()
        self.seen.append(out.detach().cpu())  # planted: XT-SYNC-03
        best = out.detach().to("cpu").numpy().max()  # planted: XT-SYNC-03
        print(best)

    def on_train_epoch_end(self):
        print(torch.cat(self.seen).mean().item())
