"""The fp16 loss scale: overflows, growth, and gradients that are held while the scale changes.

The loop of `textbook` is the one in torch's documentation, with `GradScaler` and one optimizer. For several
optimizers no such loop is right, so the others state the result: the gradients are true whatever the scale
was, an optimizer whose gradient overflowed does not step, and the scale changes once per training step in
which an optimizer stepped or would have.
"""

# ruff: noqa: D102 - hooks are documented where `xtrain.hooks` declares them
from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR

from xtrain.testing.comparison import Experiment
from xtrain.testing.experiments.gan import NCritic
from xtrain.testing.networks import Batch, d_loss, g_loss, regression, sgd
from xtrain.testing.oracle import SCALE, Plain, clip_norm, forward_regression, gan_optimizers, one_optimizer
from xtrain.testing.recorder import Recorder

BROKEN = (2, 5)
"""The batches whose gradient overflows, where an experiment causes one."""

GROWTH_INTERVAL = 2


def _growing(interval: int) -> dict[str, Any]:
    return {"scaler_kwargs": {"init_scale": SCALE, "growth_interval": interval}}


SCALED: dict[str, Any] = {"scaling": True, "batches": 8, "trainer": _growing(GROWTH_INTERVAL)}
"""Arguments that the experiments about loss scaling have in common."""


class Scale:
    """The loss scale, counted by hand: doubled after two good training steps, halved after a bad one."""

    def __init__(self) -> None:
        self.value, self._good = SCALE, 0

    def after_step(self, overflow: bool) -> None:
        """Account for one training step."""
        self._good = 0 if overflow else self._good + 1
        if overflow:
            self.value /= 2
        elif self._good == GROWTH_INTERVAL:
            self.value, self._good = self.value * 2, 0


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


def textbook(run: Plain) -> None:
    """`torch.amp.GradScaler` as its documentation shows it, clipping included; the scheduler skips with the step."""
    opt = one_optimizer(run)
    scheduler = ExponentialLR(opt, 0.8)
    scaler = torch.amp.GradScaler(run.device, init_scale=SCALE, growth_interval=GROWTH_INTERVAL)
    parameters = list(run.D.parameters())
    for _, index, batch in run.steps():
        opt.zero_grad()
        loss = forward_regression(run, batch)
        before = run.step_count[0]
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        if index in BROKEN:
            parameters[0].grad = torch.full_like(parameters[0], torch.inf)
        scaler.unscale_(opt)
        clip_norm(parameters)
        scaler.step(opt)
        scaler.update()
        applied = run.step_count[0] > before
        if applied:
            scheduler.step()
        run.note(scale=scale, applied=applied, lr=opt.param_groups[0]["lr"])


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


def overflow_in_one(run: Plain) -> None:
    """One loss feeds both optimizers and overflows in G only: D moves, G does not, the scale halves once."""
    g_opt, d_opt = gan_optimizers(run)
    scale = Scale()
    for _, index, (_, z) in run.steps():
        with run.forward_context():
            loss = regression(run.D, run.G(z), z)
        g_opt.zero_grad()
        d_opt.zero_grad()
        run.backward(loss)
        broken = index in BROKEN
        if not broken:
            g_opt.step()
        run.note(norm=clip_norm(list(run.D.parameters())), scale=scale.value)
        d_opt.step()
        run.note(applied=[not broken, True])
        scale.after_step(broken)


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


def accumulate_across(run: Plain, broken: bool) -> None:
    """G accumulates three batches while D steps every batch, and with it the scale grows or backs off."""
    g_opt, d_opt = gan_optimizers(run)
    scale = Scale()
    for _, index, (x, z) in run.steps():
        with run.forward_context():
            fake = run.G(z)
            err_d, err_g = d_loss(run.D, x, fake), g_loss(run.D, fake) / 3
        run.backward(err_g)
        d_opt.zero_grad()
        run.backward(err_d)
        run.note(scale=scale.value)
        overflow = broken and index in BROKEN
        if not overflow:
            d_opt.step()
        if (index + 1) % 3 == 0:
            run.note(norm=clip_norm(list(run.G.parameters())))
            g_opt.step()
            g_opt.zero_grad()
        scale.after_step(overflow)


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


def clip_then_wait(run: Plain) -> None:
    """Gradients clipped in one training step are used in the next, after the scale has changed."""
    g_opt, d_opt = gan_optimizers(run)
    for _, index, (x, z) in run.steps():
        if index % 2 == 0:
            with run.forward_context():
                err_d = d_loss(run.D, x, run.G(z))
            d_opt.zero_grad()
            run.backward(err_d)
            run.note(norm=clip_norm(list(run.D.parameters())))
        else:
            d_opt.step()
            d_opt.zero_grad()
        with run.forward_context():
            err_g = run.G(z).pow(2).mean()
        g_opt.zero_grad()
        run.backward(err_g)
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


def overflow_while_accumulating(run: Plain) -> None:
    """The overflow is in the first half of an accumulation: the step that would use it is skipped."""
    opt = one_optimizer(run)
    scale = Scale()
    for _, index, batch in run.steps():
        run.backward(forward_regression(run, batch) / 2)
        run.note(scale=scale.value)
        if (index + 1) % 2 == 0:
            overflow = index in BROKEN or index - 1 in BROKEN
            if not overflow:
                opt.step()
            opt.zero_grad()
            run.note(applied=not overflow)
            scale.after_step(overflow)


class GrowthWithInnerLoop(NCritic):
    """Three steps of D and one of G in a training step; the scale is seen at each of D's losses."""

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.register_hook(lambda g: self.note(scale=g.detach().clone()))
        super().manual_backward(loss, *args, **kwargs)


def growth_with_inner_loop(run: Plain) -> None:
    """Three steps of D and one of G in a training step count once for the growth of the scale."""
    g_opt, d_opt = gan_optimizers(run)
    scale = Scale()
    for _, _, (x, z) in run.steps():
        for k in (1, 2, 3):
            with run.forward_context():
                err_d = d_loss(run.D, x * k, run.G(z))
            d_opt.zero_grad()
            run.backward(err_d)
            run.note(scale=scale.value, norm=clip_norm(list(run.D.parameters())))
            d_opt.step()
        with run.forward_context():
            err_g = g_loss(run.D, run.G(z))
        g_opt.zero_grad()
        run.backward(err_g)
        run.note(scale=scale.value)
        g_opt.step()
        scale.after_step(overflow=False)


EXPERIMENTS = (
    Experiment("scaling-textbook", Textbook, textbook, **SCALED),
    Experiment("scaling-overflow-in-one", OverflowInOne, overflow_in_one, **SCALED),
    Experiment(
        "scaling-accumulate-growth",
        partial(AccumulateAcross, broken=()),
        partial(accumulate_across, broken=False),
        **SCALED,
    ),
    Experiment("scaling-accumulate-overflow", AccumulateAcross, partial(accumulate_across, broken=True), **SCALED),
    Experiment("scaling-clip-then-wait", ClipThenWait, clip_then_wait, 6, trainer=_growing(1), scaling=True),
    Experiment("scaling-overflow-while-accumulating", OverflowWhileAccumulating, overflow_while_accumulating, **SCALED),
    Experiment("scaling-inner-loop", GrowthWithInnerLoop, growth_with_inner_loop, **SCALED),
)
