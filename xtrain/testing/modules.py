"""The experiments as users write them: LightningModules in manual optimization.

Each class does what the loop of the same name in `oracle` or `oracle_more` does, and notes what it
sees (norms, losses, learning rates) under the same names. Data arrives through the Trainer, nothing
here names a device.
"""

# ruff: noqa: D102 - hooks are documented where `xtrain.hooks` declares them
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR

from xtrain import LightningModule
from xtrain.testing.networks import Batch, adam, d_loss, g_loss, networks, regression, sgd
from xtrain.testing.oracle import Notes


class Recorder(LightningModule):
    """Two networks with an optimizer each, and a notebook that is compared with the oracle's."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.G, self.D = networks()
        self.notes: Notes = {}

    def note(self, **values: Any) -> None:
        """Append to the notes; tensors are read after the run, so that noting never waits for a device."""
        for name, value in values.items():
            self.notes.setdefault(name, []).append(value)

    def configure_optimizers(self) -> Any:
        """Return SGD over G and Adam over D."""
        return sgd(self.G.parameters()), adam(self.D.parameters())

    def clip(self, opt: Any) -> Tensor:
        """Clip to norm 0.2, as the oracle's `by_norm`."""
        return self.clip_gradients(opt, gradient_clip_val=0.2, gradient_clip_algorithm="norm")


class OneOptimizer(Recorder):
    """SGD over D alone."""

    def configure_optimizers(self) -> Any:
        return sgd(self.D.parameters())

    def loss(self, batch: Batch) -> Tensor:
        """Return the supervised loss."""
        return regression(self.D, *batch)


class Gan(Recorder):
    """The specification's GAN, in its order, without any toggle."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        x, z = batch
        fake = self.G(z)
        err_d = d_loss(self.D, x, fake)
        d_opt.zero_grad()
        self.manual_backward(err_d)
        self.before_step(d_opt, "d_norm")
        d_opt.step()
        err_g = g_loss(self.D, fake)
        g_opt.zero_grad()
        self.manual_backward(err_g)
        self.before_step(g_opt, "g_norm")
        g_opt.step()
        self.log_dict({"g_loss": err_g, "d_loss": err_d}, prog_bar=True)

    def before_step(self, opt: Any, name: str) -> None:
        """Do nothing: the specification's GAN does not clip."""


class ClippedGan(Gan):
    """The GAN with `clip_gradients` before each step."""

    def __init__(self, value: float, algorithm: str = "norm") -> None:
        super().__init__()
        self.value, self.algorithm = value, algorithm

    def before_step(self, opt: Any, name: str) -> None:
        norm = self.clip_gradients(opt, gradient_clip_val=self.value, gradient_clip_algorithm=self.algorithm)
        self.note(**{name: norm})


class Accumulate(OneOptimizer):
    """One optimizer that steps after every second batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if (batch_idx + 1) % 2 == 0:
            opt.step()
            opt.zero_grad()


class AccumulateApart(Recorder):
    """G steps every second batch, D every third."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        x, z = batch
        fake = self.G(z)
        err_d, err_g = d_loss(self.D, x, fake) / 3, g_loss(self.D, fake) / 2
        self.manual_backward(err_d)
        self.manual_backward(err_g)
        if (batch_idx + 1) % 3 == 0:
            self.note(d_norm=self.clip(d_opt))
            d_opt.step()
            d_opt.zero_grad()
        if (batch_idx + 1) % 2 == 0:
            g_opt.step()
            g_opt.zero_grad()


class Frequencies(Recorder):
    """The discriminator steps every other batch, the generator every batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        x, z = batch
        fake = self.G(z)
        d_opt.zero_grad()
        self.manual_backward(d_loss(self.D, x, fake))
        if (batch_idx + 1) % 2 == 0:
            d_opt.step()
        g_opt.zero_grad()
        self.manual_backward(g_loss(self.D, fake))
        g_opt.step()


class Toggled(Recorder):
    """D accumulates two batches, shielded from G's loss by one of the spellings of toggling.

    Args:
        spelling: ``"pair"``, ``"context"`` or ``"model"``.
    """

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.G.first.bias.requires_grad_(False)

    @contextmanager
    def phase(self, opt: Any, sync_grad: bool) -> Iterator[None]:
        """Toggle `opt` in the chosen spelling."""
        if self.spelling == "pair":
            self.toggle_optimizer(opt)
            yield
            self.untoggle_optimizer(opt)
        elif self.spelling == "context":
            with self.toggled_optimizer(opt):
                yield
        else:
            with opt.toggle_model(sync_grad=sync_grad):
                yield

    def flags(self) -> list[bool]:
        """Return ``requires_grad`` of the frozen bias, of G and of D."""
        return [p.requires_grad for p in (self.G.first.bias, self.G.first.weight, self.D.first.weight)]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        x, z = batch
        last = (batch_idx + 1) % 2 == 0
        with self.phase(d_opt, sync_grad=last):
            self.manual_backward(d_loss(self.D, x, self.G(z)) / 2)
            self.note(in_d_phase=self.flags())
            if last:
                d_opt.step()
                d_opt.zero_grad()
        with self.phase(g_opt, sync_grad=True):
            err_g = g_loss(self.D, self.G(z))
            g_opt.zero_grad()
            self.manual_backward(err_g)
            self.note(in_g_phase=self.flags())
            g_opt.step()
        self.note(after=self.flags())


class NCritic(Recorder):
    """Three clipped steps of D, then one of G, inside every training step."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        x, z = batch
        for k in (1, 2, 3):
            err_d = d_loss(self.D, x * k, self.G(z))
            d_opt.zero_grad()
            self.manual_backward(err_d)
            self.note(norm=self.clip(d_opt))
            d_opt.step()
        g_opt.zero_grad()
        self.manual_backward(g_loss(self.D, self.G(z)))
        g_opt.step()


class SharedLoss(Recorder):
    """One backward feeds both optimizers; only D is clipped."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        _, z = batch
        loss = regression(self.D, self.G(z), z)
        g_opt.zero_grad()
        d_opt.zero_grad()
        self.manual_backward(loss)
        self.note(norm=self.clip(d_opt))
        d_opt.step()
        g_opt.step()


class Closure(Recorder):
    """The step is given a closure, by keyword as in the specification or by position.

    Args:
        make: the optimizer.
        positional: how the closure is passed.
    """

    def __init__(self, make: Callable[..., Any] = adam, positional: bool = False) -> None:
        super().__init__()
        self.make, self.positional = make, positional

    def configure_optimizers(self) -> Any:
        return self.make(self.D.parameters())

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()

        def closure() -> Tensor:
            loss = regression(self.D, *batch)
            opt.zero_grad()
            self.manual_backward(loss)
            return loss

        loss = opt.step(closure) if self.positional else opt.step(closure=closure)
        self.note(loss=loss)


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
        place = [self.current_epoch, batch_idx, self.trainer.is_last_batch]
        self.note(lr=opt.param_groups[0]["lr"], place=place)


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


class RawOptimizer(OneOptimizer):
    """The user's own optimizer steps, where nothing is lost by that."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers().optimizer
        assert type(opt) is torch.optim.SGD
        opt.zero_grad()
        self.manual_backward(self.loss(batch) / 2)
        opt.step()


class DirectBackward(OneOptimizer):
    """``loss.backward()`` instead of ``self.manual_backward(loss)``."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        opt.zero_grad()
        self.loss(batch).backward()
        opt.step()


class NoLoader(Recorder):
    """The GAN with latents only, made without a loader: the step has no batch."""

    def training_step(self, batch: None, batch_idx: int) -> None:
        assert batch is None
        opts = self.optimizers()
        z = torch.full((4, 3), 0.25 * (batch_idx + 1), device=self.device, dtype=self.D.first.weight.dtype)
        for opt in opts:
            opt.zero_grad()
        self.manual_backward(regression(self.D, self.G(z), z))
        for opt in opts:
            opt.step()
