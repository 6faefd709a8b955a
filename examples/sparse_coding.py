"""Sparse coding (Olshausen and Field, 1996): a dictionary learned from patches of a photograph.

    python examples/sparse_coding.py
    python examples/sparse_coding.py --precision bf16-mixed
    python examples/sparse_coding.py --help

For each batch the codes are found first, by an inner solver that no Trainer knows (FISTA: Beck and Teboulle, 2009);
then the outer optimizer moves the dictionary. It ends with a picture of the atoms, and with the reconstruction error
on held-out patches beside that of scikit-learn's MiniBatchDictionaryLearning at the same sparsity penalty.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from common import draw_images, flags, start
from sklearn.datasets import load_sample_image
from sklearn.decomposition import MiniBatchDictionaryLearning
from sklearn.feature_extraction.image import extract_patches_2d
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from xtrain import LightningModule

SIDE, ATOMS, PENALTY, BATCH = 8, 100, 0.3, 256


def load_patches() -> tuple[Tensor, Tensor]:
    """Return patches of a grey photograph to learn from, and held-out ones, ``(n, SIDE * SIDE)``.

    Each has mean 0; over all of them the standard deviation is 1. The two sets are from different halves of it.
    """
    photograph = load_sample_image("china.jpg").mean(axis=2) / 255
    halves = ((photograph[:, :320], 20480), (photograph[:, 320:], 1024))
    sets = [extract_patches_2d(half, (SIDE, SIDE), max_patches=count, random_state=0) for half, count in halves]
    train, held_out = (torch.tensor(s, dtype=torch.float32).flatten(1) for s in sets)
    train, held_out = (s - s.mean(dim=1, keepdim=True) for s in (train, held_out))
    return train / train.std(), held_out / train.std()


class Dictionary(nn.Module):
    """Unit vectors ``(ATOMS, SIDE * SIDE)``, and how patches are written as sparse sums of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(ATOMS, SIDE * SIDE))

    def atoms(self) -> Tensor:
        return normalize(self.weight.float(), dim=1)

    # --8<-- [start:codes]
    @torch.no_grad()
    def codes(self, patches: Tensor, iterations: int = 50) -> Tensor:
        """Return the codes ``(n, ATOMS)`` that minimise half the squared error plus PENALTY times their L1 norm."""
        atoms = self.atoms()
        gram, start = atoms @ atoms.T, patches.float() @ atoms.T
        step = 1 / largest_eigenvalue(gram)
        codes = momentum = torch.zeros_like(start)
        for k in range(iterations):
            moved = momentum - step * (momentum @ gram - start)
            new = moved.sign() * (moved.abs() - step * PENALTY).clamp(min=0)  # soft threshold
            momentum = new + k / (k + 3) * (new - codes)
            codes = new
        return codes

    # --8<-- [end:codes]

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction of `patches`, through which the atoms learn, and the codes."""
        with torch.autocast(patches.device.type, enabled=False):  # a solver wants all its digits
            codes = self.codes(patches)
            return codes @ self.atoms(), codes


def largest_eigenvalue(matrix: Tensor) -> Tensor:
    """Return that of a symmetric positive matrix, by power iteration, and a little more to be safe."""
    vector = torch.ones(len(matrix), device=matrix.device)
    for _ in range(20):
        vector = normalize(matrix @ vector, dim=0)
    return 1.05 * vector @ matrix @ vector


class SparseCoding(LightningModule):
    """The outer problem."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.dictionary = Dictionary()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.dictionary.parameters(), lr=0.1)
        steps = self.trainer.estimated_stepping_batches
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)]

    # --8<-- [start:step]
    def training_step(self, patches: Tensor, batch_idx: int) -> None:
        opt = self.optimizers()
        reconstruction, codes = self.dictionary(patches)
        loss = (patches - reconstruction).float().square().sum(dim=1).mean() / 2
        opt.zero_grad()
        self.manual_backward(loss)
        opt.step()
        self.lr_schedulers().step()
        self.log_dict({"loss": loss, "active": (codes != 0).float().sum(dim=1).mean()}, prog_bar=True)

    # --8<-- [end:step]

    def predict_step(self, patches: Tensor, batch_idx: int) -> tuple[Tensor, Tensor]:
        return self.dictionary(patches)


def measure(atoms: Tensor, patches: Tensor) -> tuple[float, float]:
    """Return the share of the variance that is not reconstructed, and the number of active atoms per patch."""
    dictionary = Dictionary()
    dictionary.weight.data = atoms
    codes = dictionary.codes(patches, iterations=100)
    return ((patches - codes @ dictionary.atoms()).square().sum() / patches.square().sum()).item(), (
        (codes != 0).float().sum(dim=1).mean().item()
    )


def learn_by_sklearn(patches: Tensor, passes: int, seed: int) -> Tensor:
    """Return the atoms that scikit-learn learns from the same patches, penalty and number of passes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it has not converged; neither have we
        learner = MiniBatchDictionaryLearning(
            ATOMS, alpha=PENALTY, batch_size=BATCH, max_iter=passes, random_state=seed, fit_algorithm="cd"
        )
        return torch.tensor(learner.fit(patches.double().numpy()).components_).float()


def draw_atoms(module: SparseCoding, patches: Tensor, path: Any) -> None:
    """Save the atoms as a square of pictures, those used most first, each with its own range of grey."""
    atoms = module.dictionary.atoms().detach()
    used = (module.dictionary.codes(patches) != 0).sum(dim=0).argsort(descending=True)
    pictures = (atoms / atoms.abs().amax(dim=1, keepdim=True))[used].cpu()
    draw_images(pictures.view(ATOMS, 1, SIDE, SIDE), path, columns=10, zoom=5)


def main() -> None:
    options = flags("Learn a dictionary for patches of a photograph.", epochs=8).parse_args()
    trainer = start(options, max_epochs=options.epochs)
    train, held_out = load_patches()
    module = SparseCoding()
    before = measure(module.dictionary.weight.detach().clone(), held_out)
    trainer.fit(module, DataLoader(train, batch_size=BATCH, shuffle=True, drop_last=True))

    if trainer.is_global_zero:
        options.out.mkdir(parents=True, exist_ok=True)
        module = module.cpu().float()
        draw_atoms(module, held_out, options.out / "sparse_coding.png")
        theirs = learn_by_sklearn(train, options.epochs, options.seed)
        print(f"{'':32}{'error':>8}{'active atoms':>14}")
        for name, (error, active) in {
            "random atoms": before,
            "learned": measure(module.dictionary.weight.detach(), held_out),
            "MiniBatchDictionaryLearning": measure(theirs, held_out),
        }.items():
            print(f"{name:32}{error:>8.2%}{active:>14.1f}")
        print(f"Picture: sparse_coding.png in {options.out}")


if __name__ == "__main__":
    main()
