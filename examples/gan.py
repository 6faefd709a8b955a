"""Train a class-conditional GAN on handwritten digits by manual optimization, on any backend.

    python examples/gan.py
    python examples/gan.py --backend cuda --precision 16-mixed
    python examples/gan.py --help

It ends with a row of real digits above generated ones before and after training, a grid of them, the two loss
curves, and a number that shows what was learned: how many of 1000 samples a classifier of real digits recognises as
the digit they were asked to be.
"""

from __future__ import annotations

from typing import Any

import torch
from common import (
    CLASSES,
    Curves,
    Judge,
    batches,
    draw_curves,
    draw_images,
    draw_rows,
    flags,
    load_split,
    one_of_each,
    start,
)
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import TensorDataset

from xtrain import LightningModule

NOISE, WIDTH = 32, 32

# ------------------------------------------------------------------ the model


class Generator(nn.Module):
    """Noise ``(n, NOISE)`` and labels ``(n,)`` to images ``(n, 1, 8, 8)`` with values in -1..1."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, NOISE)
        self.layers = nn.Sequential(
            nn.Linear(2 * NOISE, 2 * WIDTH * 2 * 2),
            nn.Unflatten(1, (2 * WIDTH, 2, 2)),
            nn.BatchNorm2d(2 * WIDTH),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * WIDTH, WIDTH, 4, stride=2, padding=1),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            nn.ConvTranspose2d(WIDTH, 1, 4, stride=2, padding=1),
            nn.Tanh(),
        )

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        return self.layers(torch.cat([noise, self.embed(labels)], dim=1))


class Discriminator(nn.Module):
    """Images ``(n, 1, 8, 8)`` and labels ``(n,)`` to scores ``(n, 1)``: above 0 means real."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, WIDTH, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(WIDTH, 2 * WIDTH, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * WIDTH, 2 * WIDTH, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(2 * WIDTH * 2 * 2, CLASSES),
        )

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.layers(images).gather(1, labels[:, None])  # one opinion per class, the label picks


class DigitGAN(LightningModule):
    """Two networks, two optimizers, one training step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = Generator()
        self.discriminator = Discriminator()

    def configure_optimizers(self) -> Any:
        return (
            torch.optim.Adam(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.99)),
            torch.optim.Adam(self.discriminator.parameters(), lr=1e-3, betas=(0.5, 0.99)),
        )

    def sample(self, labels: Tensor) -> Tensor:
        # On several processes each draws its own: torch's generators differ inside of a run.
        noise = torch.randn(len(labels), NOISE, device=labels.device, dtype=self.dtype)
        return self.generator(noise, labels)

    # --8<-- [start:step]
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        real, labels = batch
        opt_g, opt_d = self.optimizers()
        fake = self.sample(labels)

        # The discriminator learns to tell real digits from generated ones.
        loss_real = softplus(-self.discriminator(real, labels)).mean()
        loss_fake = softplus(self.discriminator(fake.detach(), labels)).mean()
        loss_d = loss_real + loss_fake
        opt_d.zero_grad()
        self.manual_backward(loss_d)
        self.clip_gradients(opt_d, gradient_clip_val=1.0)
        opt_d.step()

        # The generator learns to be taken for real; the discriminator needs no gradients for that.
        with self.toggled_optimizer(opt_g):
            loss_g = softplus(-self.discriminator(fake, labels)).mean()
            opt_g.zero_grad()
            self.manual_backward(loss_g)
            self.clip_gradients(opt_g, gradient_clip_val=1.0)
            opt_g.step()

        self.log_dict({"loss_g": loss_g, "loss_d": loss_d}, prog_bar=True, on_step=False, on_epoch=True)

    # --8<-- [end:step]

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.sample(batch)


# ------------------------------------------------------------------ the run


WHY_BETTER = """\
Generated digits may be recognised better than real ones: the generator draws what is typical of the class it was asked
for, while people also write digits that could be two. Being clear is not being varied: the distance measures both."""


def report(judge: Judge, before: Tensor, after: Tensor, labels: Tensor, train: Tensor, held_out: TensorDataset) -> str:
    """Return the table of what was learned; distances are to the held-out digits."""
    real, real_labels = held_out.tensors
    recognised = [judge.accuracy(before, labels), judge.accuracy(after, labels), judge.accuracy(real, real_labels)]
    distances = [judge.distance(images, real) for images in (before, after, train)]
    return "\n".join(
        [
            f"{'':28}{'before':>10}{'after':>10}{'real digits':>14}",
            f"{'recognised as their class':28}{recognised[0]:>10.1%}{recognised[1]:>10.1%}{recognised[2]:>14.1%}",
            f"{'Fréchet distance':28}{distances[0]:>10.1f}{distances[1]:>10.1f}{distances[2]:>14.1f}",
            WHY_BETTER,
        ]
    )


def main() -> None:
    options = flags("Train a class-conditional GAN on handwritten digits.", epochs=80).parse_args()
    curves = Curves("loss_g", "loss_d")
    trainer = start(options, max_epochs=options.epochs, callbacks=[curves])
    digits, held_out = load_split()
    gan = DigitGAN()

    labels = [torch.arange(100) % CLASSES] * 10
    before = torch.cat(trainer.predict(gan, labels)).float().cpu()
    trainer.fit(gan, batches(digits))
    after = torch.cat(trainer.predict(gan, labels)).float().cpu()

    if trainer.is_global_zero:
        options.out.mkdir(parents=True, exist_ok=True)
        draw_images(before[:100], options.out / "digits-before.png")
        draw_images(after[:100], options.out / "digits.png")
        rows = {"real": one_of_each(held_out), "before": before[:10], "after": after[:10]}
        draw_rows(rows, options.out / "rows.png")
        losses = {"generator": curves.values["loss_g"], "discriminator": curves.values["loss_d"]}
        draw_curves(losses, options.out / "losses.png", xlabel="epoch", ylabel="loss", title="GAN on 8x8 digits")
        print(report(Judge(digits), before, after, torch.cat(labels), digits.tensors[0], held_out))
        print(f"Pictures: digits-before.png, digits.png, rows.png and losses.png in {options.out}")


if __name__ == "__main__":
    main()
