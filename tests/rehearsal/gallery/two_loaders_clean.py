"""Two loaders in a dict, which are split over processes one by one: nothing is wrong."""

import torch
from torch import nn
from torch.utils.data import DataLoader

from xtrain import LightningModule

DEVICES, CHECKS = 2, ("protocol", "module", "data", "syncs", "memory", "cost", "range")


def loader():
    return {name: DataLoader(torch.zeros(16, 4), batch_size=4, shuffle=True) for name in ("a", "b")}


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
        noise = torch.rand(4).to(batch["a"].device)
        self.manual_backward(
            noise.sum() + self.net(batch["a"]).mean() - self.net(batch["b"]).mean() + self.net.bias.sum()
        )
        opt.step()
