"""A critic that is trained five times as often, gradients accumulated over two batches: nothing is wrong."""

import torch
from torch import nn

from xtrain import LightningModule

BATCH = "8x4"


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.actor, self.critic = nn.Linear(4, 4), nn.Linear(4, 1)

    def configure_optimizers(self):
        return [torch.optim.RMSprop(net.parameters(), lr=1e-4) for net in (self.actor, self.critic)]

    def training_step(self, batch, batch_idx):
        opt_actor, opt_critic = self.optimizers()
        loss = self.critic(self.actor(batch).detach()).mean() - self.critic(batch).mean()
        self.manual_backward(loss / 2)
        if batch_idx % 2 == 1:
            opt_critic.step()
            opt_critic.zero_grad()
        if (batch_idx + 1) % 5 == 0:
            with self.toggled_optimizer(opt_actor):
                opt_actor.zero_grad()
                self.manual_backward(-self.critic(self.actor(batch)).mean())
                opt_actor.step()
