"""``compile="step"`` with ``16-mixed``: overflows skip in a replay what they skip in an eager step."""

from __future__ import annotations

import pytest
import torch
from test_compiled_step import fit
from torch import nn

from xtrain import LightningModule

SCALE = {"init_scale": 1024.0, "growth_interval": 5}


class Gan(LightningModule):
    """Two optimizers, both clipped; a factor in the batch lets the gradients of D overflow."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.G = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6))
            self.D = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
        self.losses, self.notes = [], []

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), lr=0.003, eps=0.1) for net in (self.G, self.D)]

    def training_step(self, batch, batch_idx):
        noise, factor = batch
        g_opt, d_opt = self.optimizers()
        fake = self.G(noise)
        d_loss = nn.functional.softplus(self.D(fake.detach())).mean()
        d_opt.zero_grad()
        self.manual_backward(d_loss * factor)
        self.clip_gradients(d_opt, gradient_clip_val=0.5)
        self.step_of(d_opt)
        g_loss = nn.functional.softplus(-self.D(fake)).mean()
        g_opt.zero_grad()
        self.manual_backward(g_loss)  # adds to the gradients of D, too
        g_opt.step()
        return {"loss": g_loss.float() + d_loss.float()}

    def step_of(self, optimizer):
        optimizer.step()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        counts = [(o.step_count, o.skipped_steps, o.applied) for o in self.optimizers()]
        self.notes.append((self.trainer.backend.scaler.current_scale, self.trainer.global_step, counts))


def data(broken, batches=14):
    noise = torch.randn(batches, 8, 3, generator=torch.Generator().manual_seed(3))
    return [(x, torch.tensor(1e30 if i in broken else 1.0)) for i, x in enumerate(noise)]


def both(kind, broken, precision="16-mixed", **options):
    """Train `kind` without and with a compiler, on batches of which some overflow; return both and the Trainer."""
    plain, compiled = kind(), kind()
    options |= {"precision": precision, "scaler_kwargs": SCALE, "epochs": 2, "batches": data(broken)}
    fit(plain, None, **options)
    trainer, told = fit(compiled, "step", **options)
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(torch.tensor(compiled.losses), torch.tensor(plain.losses), rtol=2e-3, atol=2e-3)
    assert compiled.notes == plain.notes
    return plain, trainer, told


# The state is made in step 0; 1 and 2 are recorded; of the others every second one is a replay at first.
@pytest.mark.parametrize("broken", [(), (0,), (1,), (1, 2), (4, 5, 6, 9), (0, 3, 8, 13)])
def test_overflows_skip_the_same_steps(broken):
    plain, trainer, told = both(Gan, broken)
    assert trainer.compiled_step.replays > 5
    assert told == []
    assert plain.optimizers()[1].skipped_steps == 2 * len(broken)


class Sgd(Gan):
    """No state is made, and momentum is kept."""

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in (self.G, self.D)]


class Accumulating(Gan):
    """Gradients live over two steps: they get their scale back, and are rescaled when it changes."""

    def training_step(self, batch, batch_idx):
        noise, factor = batch
        opt = self.optimizers()[1]
        if batch_idx % 2 == 0:
            opt.zero_grad()
        loss = self.D(self.G(noise)).square().mean()
        self.manual_backward(loss * factor)
        self.clip_gradients(opt, gradient_clip_val=0.5)
        if batch_idx % 2 == 1:
            opt.step()
        return {"loss": loss.float()}


class Toggled(Gan):
    """G's backward leaves D alone."""

    def training_step(self, batch, batch_idx):
        g_opt, d_opt = self.optimizers()
        with g_opt.toggle_model():
            g_opt.zero_grad()
            self.manual_backward(self.D(self.G(batch[0])).mean() * batch[1])
            g_opt.step()
        with d_opt.toggle_model():
            d_opt.zero_grad()
            loss = self.D(self.G(batch[0]).detach()).square().mean()
            self.manual_backward(loss)
            d_opt.step()
        return {"loss": loss.float()}


class Waiting(Gan):
    """Clips in one step, and steps in the next on what was found there."""

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()[1]
        loss = self.D(self.G(batch[0])).square().mean()
        if batch_idx % 2 == 0:
            opt.zero_grad()
            self.manual_backward(loss * batch[1])
            self.clip_gradients(opt, gradient_clip_val=0.5)
        else:
            opt.step()
        return {"loss": loss.detach().float()}


@pytest.mark.parametrize("kind", [Sgd, Accumulating, Toggled, Waiting])
def test_other_steps_skip_the_same(kind):
    _, trainer, told = both(kind, (4, 5, 8, 9, 12))
    assert trainer.compiled_step.replays > 0
    assert told == []


def test_who_asks_whether_the_step_was_applied_trains_eagerly_and_hears_why():
    class Asking(Gan):
        def step_of(self, optimizer):
            if optimizer.step():
                self.trainer.lr_scheduler_configs[0].scheduler.step()

        def configure_optimizers(self):
            optimizers = super().configure_optimizers()
            return optimizers, [torch.optim.lr_scheduler.ExponentialLR(optimizers[1], 0.9)]

    _, trainer, (told,) = both(Asking, (1, 5))
    assert trainer.compiled_step.replays == 0
    assert "whether the loss scaler let an optimizer step" in told
    assert "if optimizer.step():" in told


def test_automatic_optimization_skips_the_same():
    class Automatic(Gan):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = True

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=0.003, eps=0.1)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        def training_step(self, batch, batch_idx):
            return self.D(self.G(batch[0])).square().mean().float() * batch[1]

        def on_train_batch_end(self, outputs, batch, batch_idx):
            opt = self.optimizers()
            self.notes.append((opt.step_count, opt.skipped_steps, opt.param_groups[0]["lr"]))
            self.losses.append(min(float(outputs["loss"]), 1.0))

    _, trainer, told = both(Automatic, (1, 6, 7), gradient_clip_val=0.5, nonfinite_loss="ignore")
    assert trainer.compiled_step.replays > 5
    assert told == []
