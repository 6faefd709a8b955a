"""A training in pieces, each on another backend: what the processes of `test_portable` are sent."""

import logging
import os
import warnings

import torch
from torch import nn
from torch.utils.data import DataLoader

from xtrain import LightningModule, ModelCheckpoint, Trainer, seed_everything

STEPS = (5, 8, 11, 16)
"""Where pieces end: inside of the first epoch of eight batches, at its end, inside of the second, at its end."""
PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
BATCH = 12


def prepare():
    os.environ["DS_ACCELERATOR"] = "cpu"
    logging.disable(logging.WARNING)


def prepare_chip():
    prepare()
    os.environ["PJRT_DEVICE"] = "CPU"


class Model(LightningModule):
    """What can go wrong when state moves: groups, a scalar, a frozen layer, buffers, uneven sizes, schedules."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        generator = torch.Generator().manual_seed(3)
        self.G, self.D = nn.Linear(7, 5), nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))
        self.scale, self.frozen = nn.Parameter(torch.tensor(0.5)), nn.Linear(5, 5)
        self.frozen.requires_grad_(False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)

    def training_step(self, batch, batch_idx):
        g_opt, d_opt = self.optimizers()
        self.seen += 1
        fake = self.frozen(self.G(batch)) * self.scale
        for opt, samples, target in ((d_opt, fake.detach(), 0.0), (g_opt, fake, 1.0)):
            opt.zero_grad()
            self.manual_backward((self.D(samples) - target).square().mean())
            self.clip_gradients(opt, 0.5)
            opt.step()
        for scheduler in self.lr_schedulers() if batch_idx % 2 else ():
            scheduler.step()

    def configure_optimizers(self):
        groups = [{"params": self.G.parameters(), "lr": 0.02, "betas": (0.5, 0.99)}, {"params": [self.scale]}]
        g_opt = torch.optim.Adam(groups, lr=0.01, eps=1e-3)
        d_opt = torch.optim.SGD(self.D.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(g_opt, 12)
        return [g_opt, d_opt], [cosine, torch.optim.lr_scheduler.StepLR(d_opt, 2)]


def rows():
    return torch.randn(8 * BATCH, 7, generator=torch.Generator().manual_seed(1))


def train(backend, options, precision, folder, stop, world_size, rank, saver=()):
    """Train up to step `stop`, from the newest checkpoint of `folder` if there is one; return the module's state."""
    warnings.simplefilter("ignore")
    if folder.startswith("shelf:"):
        from shelf import set_up  # not where this is read by a script of its own

        set_up()
    seed_everything(6)
    module = Model()
    trainer = Trainer(
        backend=backend, backend_options=options or None, precision=precision, max_steps=stop,
        callbacks=[ModelCheckpoint(folder, **dict(saver))], enable_progress_bar=False,
        scaler_kwargs={"init_scale": 16.0, "growth_interval": 6} if precision == "16-mixed" else None,
    )  # fmt: skip
    loader = DataLoader(rows(), batch_size=BATCH // world_size, shuffle=True)
    trainer.fit(module, loader, ckpt_path="last")
    counts = [optimizer.step_count for optimizer in trainer.life.optimizers]
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}, counts
