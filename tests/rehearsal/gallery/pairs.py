"""A contrastive loss, in which each process compares the samples of its own batch only."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from xtrain import LightningModule

BATCH, TARGETS, CHECKS = "8x6", ("processes",), ("agreement",)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        one, other = (normalize(self.net(batch + 0.1 * torch.randn_like(batch)), dim=1) for _ in range(2))
        scores = one @ other.T  # planted: XT-AGREE-03
        return cross_entropy(scores / 0.1, torch.arange(len(batch), device=self.device))
