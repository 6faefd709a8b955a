"""Noise, dropout, a moving average, clipping, a schedule, gathered features: the same on two processes."""

import copy

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from xtrain import LightningModule

BATCH, CHECKS = "16x6,16:int4", ("agreement",)
TARGETS = ("processes", "16-mixed", "bf16-mixed", "bf16-true", "fsdp")


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 8))
        self.head = nn.Linear(8, 4)
        self.average = copy.deepcopy(self.net).requires_grad_(False)

    def configure_optimizers(self):
        net = torch.optim.AdamW(self.net.parameters(), lr=1e-3)
        head = torch.optim.SGD(self.head.parameters(), lr=0.1, momentum=0.9)
        return [net, head], [torch.optim.lr_scheduler.CosineAnnealingLR(net, 10)]

    def training_step(self, batch, batch_idx):
        x, y = batch
        opt_net, opt_head = self.optimizers()
        time = torch.randint(0, 10, (len(x), 1), device=self.device)
        features = self.net(x + torch.randn_like(x) * time / 10)
        kept = torch.rand(len(x), device=self.device) < 0.8
        loss = cross_entropy(self.head(features), y, reduction="none").mul(kept).mean()
        opt_net.zero_grad()
        opt_head.zero_grad()
        everyone = self.all_gather(normalize(features, dim=1), sync_grads=True).flatten(0, -2)
        self.manual_backward(loss + 0.01 * (everyone @ everyone.T).square().mean())
        self.clip_gradients(opt_net, gradient_clip_val=1.0)
        opt_net.step()
        opt_head.step()
        self.lr_schedulers().step()
        with torch.no_grad():
            for own, average in zip(self.net.parameters(), self.average.parameters(), strict=True):
                average.lerp_(own, 0.1)
