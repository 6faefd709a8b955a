"""The same tiny GAN, trained by hand, by xtrain, and by the libraries it is compared with.

Each loop takes its batches from an iterable that may look at the clock, and trains in place: afterwards
all of them must have arrived at the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import xtrain

BATCH, LATENT, HIDDEN, PIXELS, CLIP = 64, 16, 64, 64, 0.5

Batches: TypeAlias = Iterable[tuple[Tensor, Tensor]]  # real samples (BATCH, PIXELS), noise (BATCH, LATENT)


class GAN(nn.Module):
    """The networks, the losses and the optimizers; who runs them is the contender's business."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS), nn.Tanh())
        self.discriminator = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.LeakyReLU(0.2), nn.Linear(HIDDEN, 1))

    def make_optimizers(self) -> tuple[torch.optim.Adam, torch.optim.Adam]:
        return (
            torch.optim.Adam(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.99)),
            torch.optim.Adam(self.discriminator.parameters(), lr=1e-3, betas=(0.5, 0.99)),
        )


def discriminator_loss(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    return softplus(-discriminator(real)).mean() + softplus(discriminator(fake.detach())).mean()


def generator_loss(discriminator: nn.Module, fake: Tensor) -> Tensor:
    return softplus(-discriminator(fake)).mean()


def by_hand(gan: GAN, batches: Batches, folder: str) -> None:
    """Train with plain PyTorch and nothing else: no logging, no progress bar."""
    opt_g, opt_d = gan.make_optimizers()
    for real, noise in batches:
        fake = gan.generator(noise)
        loss_d = discriminator_loss(gan.discriminator, real, fake)
        opt_d.zero_grad()
        loss_d.backward()
        nn.utils.clip_grad_norm_(gan.discriminator.parameters(), CLIP)
        opt_d.step()
        loss_g = generator_loss(gan.discriminator, fake)
        opt_g.zero_grad()
        loss_g.backward()
        nn.utils.clip_grad_norm_(gan.generator.parameters(), CLIP)
        opt_g.step()


def with_every_shortcut(gan: GAN, batches: Batches, folder: str) -> None:
    """Train with the same operations and as little Python around them as PyTorch allows: the floor, nothing logged."""
    run_engine: Any = torch.autograd.Variable._execution_engine.run_backward
    one = torch.ones(())

    def update(loss: Tensor, parameters: list[nn.Parameter], optimizer: Any) -> None:
        for parameter in parameters:
            parameter.grad = None
        run_engine((loss,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, (norm + 1e-6).reciprocal_().mul_(CLIP).clamp_(max=1.0))
        with torch.no_grad():
            bare_step(optimizer)

    opt_g, opt_d = gan.make_optimizers()
    bare_step: Any = type(opt_g).step
    while hasattr(bare_step, "__wrapped__"):  # without profiler, hooks and marks for the compiler
        bare_step = bare_step.__wrapped__
    of_g, of_d = list(gan.generator.parameters()), list(gan.discriminator.parameters())
    for real, noise in batches:
        fake = gan.generator(noise)
        update(discriminator_loss(gan.discriminator, real, fake), of_d, opt_d)
        update(generator_loss(gan.discriminator, fake), of_g, opt_g)


def manual_module(base: type[Any]) -> type[Any]:
    """Return the module both xtrain and Lightning run: the step of `by_hand`, plus logging."""

    class Module(base):  # type: ignore[misc]
        def __init__(self, gan: GAN) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.gan = gan

        def configure_optimizers(self) -> Any:
            return self.gan.make_optimizers()

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            real, noise = batch
            gan = self.gan
            opt_g, opt_d = self.optimizers()
            fake = gan.generator(noise)
            loss_d = discriminator_loss(gan.discriminator, real, fake)
            opt_d.zero_grad()
            self.manual_backward(loss_d)
            self.clip_gradients(opt_d, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
            opt_d.step()
            loss_g = generator_loss(gan.discriminator, fake)
            opt_g.zero_grad()
            self.manual_backward(loss_g)
            self.clip_gradients(opt_g, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
            opt_g.step()
            self.log_dict({"loss_g": loss_g, "loss_d": loss_d}, prog_bar=True)

    return Module


def with_xtrain(gan: GAN, batches: Batches, folder: str) -> None:
    """Train with xtrain: CSV logger and progress bar on."""
    trainer = xtrain.Trainer(
        backend="cpu", max_epochs=1, logger=True, default_root_dir=folder, enable_model_summary=False
    )
    trainer.fit(manual_module(xtrain.LightningModule)(gan), batches)


def with_lightning(gan: GAN, batches: Batches, folder: str) -> None:
    """Train with Lightning: CSV logger and progress bar on, checkpoints off."""
    import lightning.pytorch as pl

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=pl.loggers.CSVLogger(folder),
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(manual_module(pl.LightningModule)(gan), batches)


def with_fabric(gan: GAN, batches: Batches, folder: str) -> None:
    """Train with Lightning Fabric: the loop is by hand, without logging or progress bar."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    opt_g, opt_d = gan.make_optimizers()
    generator, opt_g = fabric.setup(gan.generator, opt_g)
    discriminator, opt_d = fabric.setup(gan.discriminator, opt_d)
    for real, noise in batches:
        fake = generator(noise)
        loss_d = discriminator_loss(discriminator, real, fake)
        opt_d.zero_grad()
        fabric.backward(loss_d)
        fabric.clip_gradients(discriminator, opt_d, max_norm=CLIP)
        opt_d.step()
        loss_g = generator_loss(discriminator, fake)
        opt_g.zero_grad()
        fabric.backward(loss_g)
        fabric.clip_gradients(generator, opt_g, max_norm=CLIP)
        opt_g.step()


def with_accelerate(gan: GAN, batches: Batches, folder: str) -> None:
    """Train with accelerate: the loop is by hand, without logging or progress bar."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    generator, discriminator, opt_g, opt_d = accelerator.prepare(
        gan.generator, gan.discriminator, *gan.make_optimizers()
    )
    for real, noise in batches:
        fake = generator(noise)
        loss_d = discriminator_loss(discriminator, real, fake)
        opt_d.zero_grad()
        accelerator.backward(loss_d)
        accelerator.clip_grad_norm_(discriminator.parameters(), CLIP)
        opt_d.step()
        loss_g = generator_loss(discriminator, fake)
        opt_g.zero_grad()
        accelerator.backward(loss_g)
        accelerator.clip_grad_norm_(generator.parameters(), CLIP)
        opt_g.step()


@dataclass
class Contender:
    """One way to train the GAN, and what was measured.

    Attributes:
        label: as printed.
        package: what has to be installed for it.
        train: trains the GAN in place on the batches; may write below the folder it is given.
        cpu: process CPU time per step, microseconds, one entry per round.
        wall: the same by the clock on the wall.
    """

    label: str
    package: str
    train: Callable[[GAN, Batches, str], None]
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


def all_contenders() -> list[Contender]:
    """Return them, the hand-written loop first."""
    return [
        Contender("hand-written", "torch", by_hand),
        Contender("hand-written, again", "torch", by_hand),  # how far from 1 its ratio is, is noise
        Contender("hand-written, every shortcut", "torch", with_every_shortcut),  # as low as it gets
        Contender("xtrain", "xtrain", with_xtrain),
        Contender("Lightning", "lightning", with_lightning),
        Contender("Fabric", "lightning", with_fabric),
        Contender("accelerate", "accelerate", with_accelerate),
    ]
