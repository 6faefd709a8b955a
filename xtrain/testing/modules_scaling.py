"""The experiments about fp16 loss scaling as LightningModules: the counterparts of `oracle_scaling`."""

# ruff: noqa: D102 - hooks are documented where `xtrain.hooks` declares them
from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR

from xtrain.testing.modules import NCritic, Recorder
from xtrain.testing.networks import Batch, d_loss, g_loss, regression, sgd
from xtrain.testing.oracle_scaling import BROKEN


class Overflowing(Recorder):
    """Makes the gradient of one network's first weight infinite in some batches, and sees the loss scale.

    Args:
        network: ``"G"`` or ``"D"``.
        broken: batches in which it happens.
    """

    def __init__(self, network: str = "D", broken: tuple[int, ...] = BROKEN) -> None:
        super().__init__()
        self.network, self.broken = network, broken
        self.index = 0

    def configure_optimizers(self) -> Any:
        self.register_overflow()
        return super().configure_optimizers()

    def register_overflow(self) -> None:
        """Hook the parameter as it is on its device, where backends may have replaced the original."""
        weight = getattr(self, self.network).first.weight
        weight.register_hook(lambda g: g * math.inf if self.index in self.broken else None)

    def see_scale(self, loss: Tensor) -> Tensor:
        """Note the gradient that arrives at `loss`, which is the loss scale itself."""
        loss.register_hook(lambda g: self.note(scale=g.detach().clone()))
        return loss


class OneOverflowing(Overflowing):
    """The same with SGD over D alone."""

    def configure_optimizers(self) -> Any:
        self.register_overflow()
        return sgd(self.D.parameters())


class Textbook(OneOverflowing):
    """Clip, step, and move the learning rate only if the step was applied."""

    def configure_optimizers(self) -> Any:
        opt = super().configure_optimizers()
        return [opt], [ExponentialLR(opt, 0.8)]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt, scheduler = self.optimizers(), self.lr_schedulers()
        self.index = batch_idx
        opt.zero_grad()
        self.manual_backward(self.see_scale(regression(self.D, *batch)))
        self.clip(opt)
        applied = opt.step()
        assert applied is opt.applied
        if applied:
            scheduler.step()
        self.note(applied=applied, lr=opt.param_groups[0]["lr"])


class OverflowInOne(Overflowing):
    """One loss feeds both optimizers and overflows in G only, which steps first."""

    def __init__(self) -> None:
        super().__init__("G")

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        self.index = batch_idx
        _, z = batch
        loss = self.see_scale(regression(self.D, self.G(z), z))
        g_opt.zero_grad()
        d_opt.zero_grad()
        self.manual_backward(loss)
        g_applied = g_opt.step()
        self.note(norm=self.clip(d_opt))
        self.note(applied=[g_applied, d_opt.step()])


class AccumulateAcross(Overflowing):
    """G accumulates three batches while D steps every batch, and with it the scale changes."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        self.index = batch_idx
        x, z = batch
        fake = self.G(z)
        err_d, err_g = d_loss(self.D, x, fake), g_loss(self.D, fake) / 3
        self.manual_backward(err_g)
        d_opt.zero_grad()
        self.manual_backward(self.see_scale(err_d))
        d_opt.step()
        if (batch_idx + 1) % 3 == 0:
            self.note(norm=self.clip(g_opt))
            g_opt.step()
            g_opt.zero_grad()


class ClipThenWait(Recorder):
    """D's gradients are clipped in one training step and used in the next."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        x, z = batch
        if batch_idx % 2 == 0:
            d_opt.zero_grad()
            self.manual_backward(d_loss(self.D, x, self.G(z)))
            self.note(norm=self.clip(d_opt))
        else:
            d_opt.step()
            d_opt.zero_grad()
        g_opt.zero_grad()
        self.manual_backward(self.G(z).pow(2).mean())
        g_opt.step()


class OverflowWhileAccumulating(OneOverflowing):
    """The overflow is in the first half of an accumulation."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        self.index = batch_idx
        self.manual_backward(self.see_scale(regression(self.D, *batch) / 2))
        if (batch_idx + 1) % 2 == 0:
            self.note(applied=opt.step())
            opt.zero_grad()


class GrowthWithInnerLoop(NCritic):
    """Three steps of D and one of G in a training step; the scale is seen at each of D's losses."""

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.register_hook(lambda g: self.note(scale=g.detach().clone()))
        super().manual_backward(loss, *args, **kwargs)


class SkippedClosure(OneOverflowing):
    """A step with a closure is skipped like any other and still returns its loss."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        self.index = batch_idx

        def closure() -> Tensor:
            loss = regression(self.D, *batch)
            opt.zero_grad()
            self.manual_backward(loss)
            return loss

        loss = opt.step(closure)
        self.note(loss=loss, applied=opt.applied)


class AutomaticOverflow(OneOverflowing):
    """In automatic optimization a skipped step does not move the learning rate either."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True

    def configure_optimizers(self) -> Any:
        opt = super().configure_optimizers()
        return {"optimizer": opt, "lr_scheduler": {"scheduler": ExponentialLR(opt, 0.8), "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.index = batch_idx
        self.note(lr=self.optimizers().param_groups[0]["lr"])
        return regression(self.D, *batch)
