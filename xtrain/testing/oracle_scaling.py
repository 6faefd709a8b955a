"""Hand-written loops about fp16 loss scaling: overflows, growth, accumulation across a changing scale.

The first loop is the textbook's, with torch's own `GradScaler` and one optimizer. For several
optimizers the textbook has no loop that is right, so the others say what must come out: the gradients
are true whatever the scale was, an optimizer whose gradient overflowed does not move, and the scale
changes once per training step in which an optimizer stepped or would have.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR

from xtrain.testing.networks import d_loss, g_loss, regression
from xtrain.testing.oracle import SCALE, Plain, by_norm, forward_regression, gan_optimizers, one_optimizer

BROKEN = (2, 5)
"""The batches whose gradient overflows, where an experiment injects one."""

GROWTH_INTERVAL = 2


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
        by_norm(parameters)
        scaler.step(opt)
        scaler.update()
        applied = run.step_count[0] > before
        if applied:
            scheduler.step()
        run.note(scale=scale, applied=applied, lr=opt.param_groups[0]["lr"])


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
        run.note(norm=by_norm(list(run.D.parameters())), scale=scale.value)
        d_opt.step()
        run.note(applied=[not broken, True])
        scale.after_step(broken)


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
            run.note(norm=by_norm(list(run.G.parameters())))
            g_opt.step()
            g_opt.zero_grad()
        scale.after_step(overflow)


def clip_then_wait(run: Plain) -> None:
    """Gradients clipped in one training step are used in the next, after the scale has changed."""
    g_opt, d_opt = gan_optimizers(run)
    for _, index, (x, z) in run.steps():
        if index % 2 == 0:
            with run.forward_context():
                err_d = d_loss(run.D, x, run.G(z))
            d_opt.zero_grad()
            run.backward(err_d)
            run.note(norm=by_norm(list(run.D.parameters())))
        else:
            d_opt.step()
            d_opt.zero_grad()
        with run.forward_context():
            err_g = run.G(z).pow(2).mean()
        g_opt.zero_grad()
        run.backward(err_g)
        g_opt.step()


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
            run.note(scale=scale.value, norm=by_norm(list(run.D.parameters())))
            d_opt.step()
        with run.forward_context():
            err_g = g_loss(run.D, run.G(z))
        g_opt.zero_grad()
        run.backward(err_g)
        run.note(scale=scale.value)
        g_opt.step()
        scale.after_step(overflow=False)


def skipped_closure(run: Plain) -> None:
    """A step with a closure is skipped like any other and still returns its loss."""
    opt = one_optimizer(run)
    for _, index, batch in run.steps():
        loss: Tensor = forward_regression(run, batch)
        opt.zero_grad()
        run.backward(loss)
        if index not in BROKEN:
            opt.step()
        run.note(loss=loss, applied=index not in BROKEN)


def automatic_overflow(run: Plain) -> None:
    """In automatic optimization a skipped step does not move the learning rate either."""
    opt = one_optimizer(run)
    scheduler = ExponentialLR(opt, 0.8)
    for _, index, batch in run.steps():
        run.note(lr=opt.param_groups[0]["lr"])
        opt.zero_grad()
        run.backward(forward_regression(run, batch))
        if index not in BROKEN:
            opt.step()
            scheduler.step()
