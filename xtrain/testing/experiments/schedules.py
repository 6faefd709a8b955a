"""Learning-rate schedulers that the module steps itself."""

# ruff: noqa: D102 - hooks are documented where `xtrain.hooks` declares them
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR

from xtrain.testing.comparison import Experiment
from xtrain.testing.networks import Batch, regression
from xtrain.testing.oracle import Plain, forward_regression, gan_optimizers, one_optimizer
from xtrain.testing.recorder import OneOptimizer, Recorder


class ScheduleEveryStep(Recorder):
    """Two schedulers, each stepped every batch."""

    def configure_optimizers(self) -> Any:
        pair = super().configure_optimizers()
        return list(pair), [ExponentialLR(pair[0], 0.8), StepLR(pair[1], 2, 0.5)]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        pair = self.optimizers()
        _, z = batch
        loss = regression(self.D, self.G(z), z)
        for opt in pair:
            opt.zero_grad()
        self.manual_backward(loss)
        for opt, scheduler in zip(pair, self.lr_schedulers(), strict=True):
            opt.step()
            scheduler.step()
        self.note(lr=[opt.param_groups[0]["lr"] for opt in pair])


def schedule_every_step(run: Plain) -> None:
    """Two schedulers, each stepped every batch."""
    pair = gan_optimizers(run)
    schedulers = [ExponentialLR(pair[0], 0.8), StepLR(pair[1], 2, 0.5)]
    for _, _, (_, z) in run.steps():
        with run.forward_context():
            loss = regression(run.D, run.G(z), z)
        for opt in pair:
            opt.zero_grad()
        run.backward(loss)
        for opt, scheduler in zip(pair, schedulers, strict=True):
            opt.step()
            scheduler.step()
        run.note(lr=[opt.param_groups[0]["lr"] for opt in pair])


class ScheduleSometimes(OneOptimizer):
    """One scheduler, stepped every three batches and at the end of every second epoch; its config is ignored."""

    def configure_optimizers(self) -> Any:
        opt = super().configure_optimizers()
        config = {"scheduler": ExponentialLR(opt, 0.7), "interval": "step", "frequency": 1}
        return {"optimizer": opt, "lr_scheduler": config}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.loss(batch))
        opt.step()
        scheduler = self.lr_schedulers()
        if (batch_idx + 1) % 3 == 0:
            scheduler.step()
        if self.trainer.is_last_batch and (self.trainer.current_epoch + 1) % 2 == 0:
            scheduler.step()
        position = [self.current_epoch, batch_idx, self.trainer.is_last_batch]
        self.note(lr=opt.param_groups[0]["lr"], position=position)


def schedule_sometimes(run: Plain, steps: int = 3, epochs: int = 2) -> None:
    """One scheduler, stepped every N batches and again at the end of every N epochs."""
    opt = one_optimizer(run)
    scheduler = ExponentialLR(opt, 0.7)
    for epoch, index, batch in run.steps():
        opt.zero_grad()
        run.backward(forward_regression(run, batch))
        opt.step()
        if (index + 1) % steps == 0:
            scheduler.step()
        if index + 1 == len(run.data) and (epoch + 1) % epochs == 0:
            scheduler.step()
        run.note(lr=opt.param_groups[0]["lr"], position=[epoch, index, index + 1 == len(run.data)])


class Plateau(OneOptimizer):
    """ReduceLROnPlateau on the epoch's mean loss, read from ``callback_metrics``."""

    def configure_optimizers(self) -> Any:
        opt = super().configure_optimizers()
        return [opt], [ReduceLROnPlateau(opt, factor=0.5, patience=0, threshold=0.3)]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        loss = self.loss(batch)
        opt.zero_grad()
        self.manual_backward(loss)
        opt.step()
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]), sync_dist=True)

    def on_train_epoch_end(self) -> None:
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, ReduceLROnPlateau)
        mean = self.trainer.callback_metrics["loss"]
        scheduler.step(mean)
        self.note(mean=mean, lr=self.optimizers().param_groups[0]["lr"])


def plateau(run: Plain) -> None:
    """ReduceLROnPlateau on the epoch's mean loss."""
    opt = one_optimizer(run)
    scheduler = ReduceLROnPlateau(opt, factor=0.5, patience=0, threshold=0.3)
    losses: list[Tensor] = []
    for _, index, batch in run.steps():
        loss = forward_regression(run, batch)
        opt.zero_grad()
        run.backward(loss)
        opt.step()
        losses.append(loss.detach().float())
        if index + 1 == len(run.data):
            mean = torch.stack(losses).mean()
            scheduler.step(float(mean))
            run.note(mean=mean, lr=opt.param_groups[0]["lr"])
            losses.clear()


EXPERIMENTS = (
    Experiment("schedule-every-step", ScheduleEveryStep, schedule_every_step),
    Experiment("schedule-sometimes", ScheduleSometimes, schedule_sometimes, batches=7, epochs=4),
    Experiment("plateau", Plateau, plateau, epochs=4),
)
