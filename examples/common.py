"""What the examples share: the flags, the digits, a judge of generated digits, and pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import DataLoader, TensorDataset

from xtrain import Callback, LightningModule, Trainer, seed_everything

try:
    import matplotlib
    from sklearn.datasets import load_digits

    matplotlib.use("Agg")  # pictures go to files, no display is needed
    from matplotlib import pyplot as plt
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}; the examples need: pip install 'xtrain-torch[examples]'") from error

CLASSES, BATCH = 10, 64

# ------------------------------------------------------------------ flags


def flags(description: str, **length: int) -> argparse.ArgumentParser:
    """Return a parser of the flags that all examples have.

    Args:
        description: one sentence about the example.
        **length: what bounds the training, and its default: ``epochs=80`` becomes the flag ``--epochs``.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--backend", default="cpu", help="see `xtrain backends` (default: cpu)")
    parser.add_argument("--backend-option", type=read_option, action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--precision", default=None, help="such as bf16-mixed (default: the launcher's, else 32-true)")
    parser.add_argument("--devices", type=int, help="number of devices (default: what the launcher started)")
    for name, default in length.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"how long to train (default: {default})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the pictures (default: outputs)")
    return parser


def read_option(text: str) -> tuple[str, Any]:
    """Return ``key=value`` as a pair; the value is read as JSON where it is JSON."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"expected key=value, such as stage=2; received {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def start(options: argparse.Namespace, **others: Any) -> Trainer:
    """Seed everything and return the Trainer that the flags ask for.

    Args:
        options: what the parser of `flags` read.
        **others: further arguments of the Trainer.
    """
    torch.set_num_threads(1)  # layers this small are done before a second thread has woken up
    seed_everything(options.seed)
    return Trainer(
        options.backend,
        backend_options=dict(options.backend_option),
        precision=options.precision,
        devices=options.devices,
        **others,
    )


class Curves(Callback):
    """Keeps what the module logged under `names`, after every epoch.

    Args:
        names: as given to ``self.log``.
    """

    def __init__(self, *names: str) -> None:
        self.values: dict[str, list[float]] = {name: [] for name in names}

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        for name, values in self.values.items():
            values.append(float(trainer.callback_metrics[name]))


# ------------------------------------------------------------------ the digits, and who judges generated ones


def load_split() -> tuple[TensorDataset, TensorDataset]:
    """Return 1437 digits to train on and 360 held out: images ``(n, 1, 8, 8)`` in -1..1, labels ``(n,)``."""
    pixels, targets = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    labels = torch.tensor(targets)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, train = order[:360], order[360:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[held_out], labels[held_out])


def one_of_each(digits: TensorDataset) -> Tensor:
    """Return the first image of each class, ``(10, 1, 8, 8)``."""
    images, labels = digits.tensors
    return torch.stack([images[labels == label][0] for label in range(CLASSES)])


def batches(digits: Any) -> DataLoader[Any]:
    """Return shuffled batches, all of one size: a compiler (XLA) that sees a new shape starts over."""
    return DataLoader(digits, batch_size=BATCH, shuffle=True, drop_last=True)


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


# ------------------------------------------------------------------ pictures


def draw_images(images: Tensor, path: Path, columns: int = 10, zoom: int = 6) -> None:
    """Save images ``(n, 1, h, w)`` with values in -1..1 as a grid, row by row; -1 is white.

    Args:
        images: `n` is a multiple of `columns`.
        path: a file in a folder that exists.
        columns: images in a row.
        zoom: pixels of the file for a pixel of an image, along each side.
    """
    framed = pad(images, (1, 1, 1, 1), value=-1.0)
    _, _, height, width = framed.shape
    grid = framed.view(-1, columns, height, width).permute(0, 2, 1, 3).reshape(-1, columns * width)
    plt.imsave(path, grid.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1).numpy(), cmap="gray_r", vmin=-1, vmax=1)


def draw_rows(rows: Mapping[str, Tensor], path: Path) -> None:
    """Save a row of images per label; each is ``(n, 1, h, w)`` with values in -1..1, where -1 is white."""
    figure, grid = plt.subplots(len(rows), squeeze=False, figsize=(8, 0.95 * len(rows)))
    for axes, (label, images) in zip(grid[:, 0], rows.items(), strict=True):
        strip = pad(images[:, 0], (1, 1, 1, 1), value=-1.0).permute(1, 0, 2).flatten(1)
        axes.imshow(strip.numpy(), cmap="gray_r", vmin=-1, vmax=1, aspect="equal")
        axes.set_ylabel(label, rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[])
    save(figure, path)


def draw_curves(
    curves: Mapping[str, Sequence[float]], path: Path, x: Sequence[float] | None = None, **axis: Any
) -> None:
    """Save one line per curve.

    Args:
        curves: values by label.
        path: a file in a folder that exists.
        x: where the values are; default: 1, 2, 3 ...
        **axis: what the axes are set to: ``xlabel``, ``ylabel``, ``title``, ``yscale`` ...
    """
    figure, axes = plt.subplots(figsize=(7, 4))
    for label, values in curves.items():
        axes.plot(range(1, len(values) + 1) if x is None else x, values, label=label)
    axes.set(**axis)
    axes.legend()
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Save a figure of matplotlib, and free it."""
    figure.savefig(path, dpi=90, bbox_inches="tight")
    plt.close(figure)
