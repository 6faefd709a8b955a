"""Wasserstein GAN with gradient penalty (Gulrajani et al., 2017) on handwritten digits.

    python examples/wgan_gp.py
    python examples/wgan_gp.py --backend deepspeed --backend-option stage=3
    python examples/wgan_gp.py --help

The critic takes five steps for each one of the generator. Its loss estimates how far generated digits are from real
ones, so it should fall as they get better. It ends with that curve beside the Fréchet distance of a judge, a row of
digits, and the rank correlation of the two curves.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Judge, batches, draw_rows, flags, load_split, one_of_each, plt, save, start
from torch import Tensor, nn

from xtrain import Callback, LightningModule, Trainer

N_CRITIC, PENALTY, NOISE, WIDTH = 5, 10.0, 32, 256


class Generator(nn.Sequential):
    """Noise ``(n, NOISE)`` to images ``(n, 1, 8, 8)`` with values in -1..1."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(NOISE, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, 64),
            nn.Unflatten(1, (1, 8, 8)),
            nn.Tanh(),
        )


class Critic(nn.Sequential):
    """Images ``(n, 1, 8, 8)`` to scores ``(n, 1)``; no batch norm, since the penalty is on each image."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(64, WIDTH),
            nn.LeakyReLU(0.2),
            nn.Linear(WIDTH, WIDTH),
            nn.LeakyReLU(0.2),
            nn.Linear(WIDTH, 1),
        )


class WGAN(LightningModule):
    """Algorithm 1 of the paper."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = Generator()
        self.critic = Critic()

    def configure_optimizers(self) -> Any:
        return (
            torch.optim.Adam(self.generator.parameters(), lr=5e-4, betas=(0.5, 0.9)),
            torch.optim.Adam(self.critic.parameters(), lr=5e-4, betas=(0.5, 0.9)),
        )

    def sample(self, count: int) -> Tensor:
        return self.generator(torch.randn(count, NOISE, device=self.device, dtype=self.dtype))

    def penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        mix = torch.rand(len(real), 1, 1, 1, device=real.device, dtype=real.dtype)
        between = (mix * real + (1 - mix) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).float().sum(), between, create_graph=True)
        return (slope.float().flatten(1).norm(dim=1) - 1).square().mean()

    # --8<-- [start:step]
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        real, _ = batch
        opt_g, opt_c = self.optimizers()

        with torch.no_grad():
            fake = self.sample(len(real))
        with self.trainer.backend.full_parameters(self.critic):  # does nothing but on ZeRO stage 3
            loss_c = (self.critic(fake) - self.critic(real)).float().mean()
            penalty = self.penalty(real, fake)
            opt_c.zero_grad()
            self.manual_backward(loss_c + PENALTY * penalty)
        opt_c.step()

        if (batch_idx + 1) % N_CRITIC == 0:
            with self.toggled_optimizer(opt_g):  # the critic needs no gradients here
                loss_g = -self.critic(self.sample(len(real))).float().mean()
                opt_g.zero_grad()
                self.manual_backward(loss_g)
                opt_g.step()

        self.log_dict({"distance": -loss_c, "penalty": penalty}, prog_bar=True, on_step=False, on_epoch=True)

    # --8<-- [end:step]

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.generator(batch)


class Progress(Callback):
    """Keeps the critic's estimate of the distance, and samples of the same noise, two dozen times.

    Args:
        noise: ``(n, NOISE)``.
        epochs: of the whole training.
    """

    def __init__(self, noise: Tensor, epochs: int) -> None:
        self.noise, self.every = noise, max(1, epochs // 24)
        self.epochs: list[int] = []
        self.estimates: list[float] = []
        self.samples: list[Tensor] = []

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every == 0:
            with torch.no_grad():
                images = module.predict_step(self.noise.to(module.device, module.dtype), 0)
            self.epochs.append(trainer.current_epoch + 1)
            self.estimates.append(float(trainer.callback_metrics["distance"]))
            self.samples.append(trainer.backend.to_cpu(images).float())


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Return Spearman's correlation: 1 if the two lists have the same order."""
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def draw_distances(progress: Progress, frechet: list[float], path: Any) -> None:
    """Save the critic's estimate and the judge's distance over the epochs, each on its own axis."""
    figure, left = plt.subplots(figsize=(7, 4))
    right = left.twinx()
    left.plot(progress.epochs, progress.estimates, color="tab:blue")
    right.plot(progress.epochs, frechet, color="tab:orange")
    left.set(xlabel="epoch", title="WGAN-GP on 8x8 digits")
    left.set_ylabel("critic's estimate of the Wasserstein distance", color="tab:blue")
    right.set_ylabel("Fréchet distance", color="tab:orange")
    right.set_yscale("log")
    save(figure, path)


def main() -> None:
    options = flags("Train a Wasserstein GAN with gradient penalty on handwritten digits.", epochs=80).parse_args()
    digits, held_out = load_split()
    progress = Progress(torch.randn(1000, NOISE, generator=torch.Generator().manual_seed(0)), options.epochs)
    trainer = start(options, max_epochs=options.epochs, callbacks=[progress])
    gan = WGAN()
    (before,) = trainer.predict(gan, [progress.noise])
    trainer.fit(gan, batches(digits))

    if trainer.is_global_zero:
        options.out.mkdir(parents=True, exist_ok=True)
        real = held_out.tensors[0]
        judge = Judge(digits)
        frechet = [judge.distance(images, real) for images in progress.samples]
        rows = {"real": one_of_each(held_out), "before": before[:10].float().cpu(), "after": progress.samples[-1][:10]}
        draw_rows(rows, options.out / "wgan_gp-digits.png")
        draw_distances(progress, frechet, options.out / "wgan_gp.png")
        floor = judge.distance(digits.tensors[0], real)
        print(f"Fréchet distance: {judge.distance(before.float().cpu(), real):.1f} before, {frechet[-1]:.1f} after")
        print(f"(real digits to train on: {floor:.1f})")
        print(f"rank correlation with the critic's estimate: {rank_correlation(progress.estimates, frechet):.2f}")
        print(f"Pictures: wgan_gp.png and wgan_gp-digits.png in {options.out}")


if __name__ == "__main__":
    main()
