"""Bootstrap your own latent (Grill et al., 2020): features without labels, and a linear probe on them.

    python examples/byol.py
    python examples/byol.py --precision bf16-mixed
    python examples/byol.py --help

A network predicts what its own slowly moving average says about another view of the same digit. No label is used. It
ends with the accuracy of a linear classifier of these features that sees five labels of each class, beside the same on
pixels and on features of an untrained network, and with a picture: held-out digits and their nearest neighbours.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from common import CLASSES, batches, draw_rows, flags, load_split, one_of_each, start
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cosine_similarity, grid_sample, normalize
from torch.utils.data import Dataset, TensorDataset

from xtrain import LightningModule

WIDTH, FEATURES, HIDDEN, EMA, LABELS = 32, 128, 256, 0.99, 5


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """Each digit as two views: turned, shifted, scaled, sheared and with noise, at random."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, rows: list[int]) -> list[tuple[Tensor, Tensor]]:
        images = self.images[rows]
        return list(zip(view(images), view(images), strict=True))


def view(images: Tensor) -> Tensor:
    """Return `images` ``(n, 1, 8, 8)``, each changed by a random affine map and noise."""
    maps = torch.eye(2, 3) + torch.randn(len(images), 2, 3) * torch.tensor([0.15, 0.15, 0.12])
    moved = grid_sample(images + 1, affine_grid(maps, list(images.shape), align_corners=False), align_corners=False) - 1
    return moved + 0.2 * torch.randn_like(moved)


def encoder() -> nn.Sequential:
    """Return the network that is kept. A layer has no bias where a batch norm after it would take it away again."""
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, padding=1, bias=False),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
        nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * WIDTH),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * WIDTH * 16, FEATURES, bias=False),
    )


def perceptron(inputs: int) -> nn.Sequential:
    layers = (nn.Linear(inputs, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(HIDDEN, 64, bias=False))


class BYOL(LightningModule):
    """Algorithm 1 of the paper."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.encoder, self.projector, self.predictor = encoder(), perceptron(FEATURES), perceptron(64)
        self.target = copy.deepcopy(nn.Sequential(self.encoder, self.projector)).requires_grad_(False)

    def configure_optimizers(self) -> Any:
        online = [*self.encoder.parameters(), *self.projector.parameters(), *self.predictor.parameters()]
        return torch.optim.AdamW(online, lr=2e-3, weight_decay=1e-4)

    # --8<-- [start:step]
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        opt = self.optimizers()
        views = torch.cat(batch)  # both directions at once: each view predicts the other
        with torch.no_grad():
            wanted = self.target(views.roll(len(batch[0]), dims=0)).float()
        predicted = self.predictor(self.projector(self.encoder(views))).float()
        loss = 2 - 2 * cosine_similarity(predicted, wanted).mean()
        opt.zero_grad()
        self.manual_backward(loss)
        opt.step()
        self.move_target()
        self.log("loss", loss, prog_bar=True, on_step=False, on_epoch=True)

    @torch.no_grad()
    def move_target(self) -> None:
        with self.trainer.backend.full_parameters(self):  # does nothing but on ZeRO stage 3
            online = [*self.encoder.parameters(), *self.projector.parameters()]
            for average, parameter in zip(self.target.parameters(), online, strict=True):
                average.lerp_(parameter, 1 - EMA)

    # --8<-- [end:step]

    def predict_step(self, images: Tensor, batch_idx: int) -> Tensor:
        return self.encoder(images)


def probe(features: Tensor, labels: Tensor, held_out: Tensor, truth: Tensor) -> float:
    """Return the accuracy on `held_out` of a linear classifier of `features`, from five rows of each class.

    The mean over five choices of these rows.
    """
    scale = features.std(dim=0).clamp(min=1e-6)
    features, held_out = ((x - features.mean(dim=0)) / scale for x in (features, held_out))
    scores = []
    for seed in range(5):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        rows = torch.cat([order[labels[order] == label][:LABELS] for label in range(CLASSES)])
        classifier = LogisticRegression(C=0.1, max_iter=500).fit(features[rows].numpy(), labels[rows].numpy())
        scores.append(classifier.score(held_out.numpy(), truth.numpy()))
    return sum(scores) / len(scores)


def main() -> None:
    options = flags("Learn features of digits without labels.", epochs=30).parse_args()
    trainer = start(options, max_epochs=options.epochs)
    (images, labels), (held_out, truth) = (part.tensors for part in load_split())
    module, everything = BYOL(), [images, held_out]
    before = [part.float().cpu() for part in trainer.predict(module, everything)]
    trainer.fit(module, batches(TwoViews(images)))
    after = [part.float().cpu() for part in trainer.predict(module, everything)]

    if trainer.is_global_zero:
        options.out.mkdir(parents=True, exist_ok=True)
        rows = [int((truth == label).nonzero()[0]) for label in range(CLASSES)]
        nearest = (normalize(after[1][rows]) @ normalize(after[0]).T).topk(4, dim=1).indices
        pictures = {f"neighbour {k + 1}": images[nearest[:, k]] for k in range(4)}
        draw_rows({"digit": one_of_each(TensorDataset(held_out, truth)), **pictures}, options.out / "byol.png")
        print(f"accuracy of a linear probe with {LABELS} labels of each class:")
        for name, (train, test) in {
            "pixels": (images.flatten(1), held_out.flatten(1)),
            "features before training": before,
            "features after training": after,
        }.items():
            print(f"  {name:26}{probe(train, labels, test, truth):>8.1%}")
        print(f"Picture: byol.png in {options.out}")


if __name__ == "__main__":
    main()
