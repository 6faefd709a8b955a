"""The smallest module that trains, validates, tests and predicts, and its data, under the names that reports use.

Example:
    >>> from xtrain.demos.boring_classes import BoringModel
    >>> Trainer(max_epochs=1, enable_progress_bar=False).fit(BoringModel())
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torch.utils.data import DataLoader, Dataset, IterableDataset

from xtrain.compat.imports import complete
from xtrain.data.datamodule import LightningDataModule
from xtrain.module import LightningModule

_FEATURES, _SAMPLES = 32, 64


class RandomDataset(Dataset[Tensor]):
    """Normal random numbers, drawn once.

    Args:
        size: numbers of a sample.
        length: samples.
    """

    def __init__(self, size: int, length: int) -> None:
        self.len, self.data = length, torch.randn(length, size)

    def __getitem__(self, index: int) -> Tensor:
        return self.data[index]

    def __len__(self) -> int:
        return self.len


class RandomDictDataset(Dataset[dict[str, Tensor]]):
    """As `RandomDataset`, with samples ``{"a": numbers, "b": numbers + 2}``.

    Args:
        size: numbers of a sample.
        length: samples.
    """

    def __init__(self, size: int, length: int) -> None:
        self.len, self.data = length, torch.randn(length, size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"a": self.data[index], "b": self.data[index] + 2}

    def __len__(self) -> int:
        return self.len


class RandomIterableDataset(IterableDataset[Tensor]):
    """A stream of normal random numbers that does not know its length.

    Args:
        size: numbers of a sample.
        count: samples of an epoch.
    """

    def __init__(self, size: int, count: int) -> None:
        self.size, self.count = size, count

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.count):
            yield torch.randn(self.size)


class RandomIterableDatasetWithLen(RandomIterableDataset):
    """The same, with a length."""

    def __len__(self) -> int:
        return self.count


class BoringModel(LightningModule):
    """One linear layer of 32 to 2 features, SGD, a schedule by epochs, and 64 random samples for every stage."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(_FEATURES, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's outputs, of shape (batch, 2)."""
        return self.layer(x)  # type: ignore[no-any-return]

    def loss(self, preds: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the mean squared distance to ones; `labels` are not looked at."""
        return nn.functional.mse_loss(preds, torch.ones_like(preds))

    def step(self, batch: Any) -> Tensor:
        """Return the loss of a batch of shape (batch, 32)."""
        return self.loss(self(batch))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the loss."""
        return {"loss": self.step(batch)}

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the loss as ``x``."""
        return {"x": self.step(batch)}

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the loss as ``y``."""
        return {"y": self.step(batch)}

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        """Return SGD, and a schedule that divides its rate by 10 after each epoch."""
        optimizer = SGD(self.layer.parameters(), lr=0.1)
        return [optimizer], [StepLR(optimizer, step_size=1)]

    def train_dataloader(self) -> Any:
        """Return 64 batches of one sample."""
        return DataLoader(RandomDataset(_FEATURES, _SAMPLES))

    def val_dataloader(self) -> Any:
        """Return as many, others."""
        return DataLoader(RandomDataset(_FEATURES, _SAMPLES))

    def test_dataloader(self) -> Any:
        """Return as many, others."""
        return DataLoader(RandomDataset(_FEATURES, _SAMPLES))

    def predict_dataloader(self) -> Any:
        """Return as many, others."""
        return DataLoader(RandomDataset(_FEATURES, _SAMPLES))


class ManualOptimBoringModel(BoringModel):
    """The same in manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Do one step of the optimizer; return the loss."""
        opt = self.optimizers()
        loss = self.step(batch)
        opt.zero_grad()
        self.manual_backward(loss)
        opt.step()
        return loss


class BoringDataModule(LightningDataModule):
    """64 random samples for every stage, made in ``setup``."""

    def __init__(self) -> None:
        super().__init__()
        self.random_full: Any = None

    def setup(self, stage: str) -> None:
        """Draw all of them at once; each stage has a part of its own."""
        if self.random_full is None:
            self.random_full = RandomDataset(_FEATURES, 4 * _SAMPLES)
            parts = torch.utils.data.random_split(self.random_full, [_SAMPLES] * 4)
            self.random_train, self.random_val, self.random_test, self.random_predict = parts

    def train_dataloader(self) -> Any:
        """Return 64 batches of one sample."""
        return DataLoader(self.random_train)

    def val_dataloader(self) -> Any:
        """Return as many, others."""
        return DataLoader(self.random_val)

    def test_dataloader(self) -> Any:
        """Return as many, others."""
        return DataLoader(self.random_test)

    def predict_dataloader(self) -> Any:
        """Return as many, others."""
        return DataLoader(self.random_predict)


class DemoModel(LightningModule):
    """One linear layer of 32 features, for a command line to set.

    Args:
        out_dim: its outputs.
        learning_rate: of SGD.
    """

    def __init__(self, out_dim: int = 10, learning_rate: float = 0.02) -> None:
        super().__init__()
        self.l1, self.learning_rate = nn.Linear(_FEATURES, out_dim), learning_rate

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations, of shape (batch, out_dim)."""
        return torch.relu(self.l1(x.flatten(1)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the mean activation as loss."""
        return self(batch).mean()

    def configure_optimizers(self) -> Optimizer:
        """Return SGD."""
        return SGD(self.parameters(), lr=self.learning_rate)


complete(__name__)
