"""Train a class-conditional GAN on handwritten digits by manual optimization, on any backend.

    python examples/gan.py
    python examples/gan.py --backend cuda --precision 16-mixed
    python examples/gan.py --help

It ends with a grid of generated digits, the two loss curves, and a figure that shows what was learned: how
many of 1000 samples a classifier of real digits recognises as the digit they were asked to be.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, softplus
from torch.utils.data import DataLoader, TensorDataset

from xtrain import Callback, LightningModule, Trainer, seed_everything

matplotlib.use("Agg")  # pictures go to files, no display is needed
from matplotlib import pyplot as plt

CLASSES, NOISE, WIDTH, BATCH = 10, 32, 32, 64

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

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.sample(batch)


class LossCurves(Callback):
    """Keeps the losses of each epoch."""

    def __init__(self) -> None:
        self.losses: dict[str, list[float]] = {"loss_g": [], "loss_d": []}

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        for name, values in self.losses.items():
            values.append(float(trainer.callback_metrics[name]))


# ------------------------------------------------------------------ the data, and who judges the samples


def load_split() -> tuple[TensorDataset, TensorDataset]:
    """Return 1437 digits to train on and 360 held out: images ``(n, 1, 8, 8)`` in -1..1, labels ``(n,)``."""
    pixels, targets = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    labels = torch.tensor(targets)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, train = order[:360], order[360:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[held_out], labels[held_out])


class Judge:
    """A classifier that has only ever seen real digits.

    Args:
        digits: what it learns from, about two seconds on a CPU.
    """

    def __init__(self, digits: TensorDataset) -> None:
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, CLASSES)
        optimizer = torch.optim.Adam([*self.features.parameters(), *self.head.parameters()], lr=2e-3)
        loader = DataLoader(digits, batch_size=BATCH, shuffle=True)
        for _ in range(15):
            for images, labels in loader:
                optimizer.zero_grad()
                cross_entropy(self.head(self.features(images)), labels).backward()
                optimizer.step()

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Return the fraction of `images` recognised as their label."""
        return (self.head(self.features(images)).argmax(dim=1) == labels).float().mean().item()

    @torch.no_grad()
    def distance(self, a: Tensor, b: Tensor) -> float:
        """Return the Fréchet distance between two sets of images in the feature space; 0 if they agree."""
        x, y = self.features(a).double(), self.features(b).double()
        cov_x, cov_y = torch.cov(x.T), torch.cov(y.T)
        cross = torch.linalg.eigvals(cov_x @ cov_y).real.clamp(min=0).sqrt().sum()
        gap = x.mean(dim=0) - y.mean(dim=0)
        return (gap @ gap + cov_x.trace() + cov_y.trace() - 2 * cross).item()


# ------------------------------------------------------------------ the run


def draw_digits(images: Tensor, path: Path) -> None:
    """Save 100 images ``(100, 1, 8, 8)`` as a grid, one column per class."""
    framed = pad(images, (1, 1, 1, 1), value=-1.0).view(10, 10, 10, 10)
    grid = framed.permute(0, 2, 1, 3).reshape(100, 100)
    plt.imsave(path, grid.repeat_interleave(6, dim=0).repeat_interleave(6, dim=1), cmap="gray_r")


def draw_losses(losses: dict[str, list[float]], path: Path) -> None:
    """Save the loss of each network over the epochs."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, label in (("loss_g", "generator"), ("loss_d", "discriminator")):
        axes.plot(range(1, len(losses[name]) + 1), losses[name], label=label)
    axes.set(xlabel="epoch", ylabel="loss", title="GAN on 8x8 digits")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


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
        ]
    )


def read_option(text: str) -> tuple[str, Any]:
    """Return ``key=value`` as a pair; the value is read as JSON where it is JSON."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"expected key=value, such as stage=2; received {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a class-conditional GAN on handwritten digits.")
    parser.add_argument("--backend", default="cpu", help="see `xtrain backends` (default: cpu)")
    parser.add_argument("--backend-option", type=read_option, action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--precision", default=None, help="such as bf16-mixed (default: the launcher's, else 32-true)")
    parser.add_argument("--devices", type=int, help="number of devices (default: what the launcher started)")
    parser.add_argument("--epochs", type=int, default=80, help="passes over the digits (default: 80)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the pictures (default: outputs)")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)  # layers this small are done before a second thread has woken up
    seed_everything(options.seed)
    digits, held_out = load_split()
    gan, curves = DigitGAN(), LossCurves()
    trainer = Trainer(
        options.backend,
        backend_options=dict(options.backend_option),
        precision=options.precision,
        devices=options.devices,
        max_epochs=options.epochs,
        callbacks=[curves],
    )

    # Every batch has the same size: a compiler (XLA) that sees a new shape starts over.
    loader = DataLoader(digits, batch_size=BATCH, shuffle=True, drop_last=True)
    labels = [torch.arange(100) % CLASSES] * 10
    before = torch.cat(trainer.predict(gan, labels)).float().cpu()
    trainer.fit(gan, loader)
    after = torch.cat(trainer.predict(gan, labels)).float().cpu()

    if trainer.is_global_zero:
        options.out.mkdir(parents=True, exist_ok=True)
        draw_digits(before[:100], options.out / "digits-before.png")
        draw_digits(after[:100], options.out / "digits.png")
        draw_losses(curves.losses, options.out / "losses.png")
        print(report(Judge(digits), before, after, torch.cat(labels), digits.tensors[0], held_out))
        print("Pictures: " + ", ".join(str(options.out / f"{n}.png") for n in ("digits-before", "digits", "losses")))


if __name__ == "__main__":
    main()
