"""DataModules, and the way of a batch to the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xtrain.contract import Backend
from xtrain.hooks import BatchHooks, is_overridden
from xtrain.hparams import KeepsHyperParameters


class LightningDataModule(KeepsHyperParameters, BatchHooks):
    """Keeps the loaders of an experiment together; override what is needed.

    `prepare_data` runs on one process (downloads), `setup` on all.

    Example:
        >>> class Numbers(LightningDataModule):
        ...     def setup(self, stage):
        ...         self.rows = torch.randn(8, 3)
        ...
        ...     def train_dataloader(self):
        ...         return torch.utils.data.DataLoader(self.rows, batch_size=2)
        >>> trainer.fit(module, datamodule=Numbers())
        >>> trainer.num_training_batches
        4
    """

    trainer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # Loader workers may get it, and copies are free of the run.
        return {**self.__dict__, "trainer": None}

    def prepare_data(self) -> None:
        """Download or write files; runs on rank 0 only."""

    def setup(self, stage: str) -> None:
        """Make datasets; `stage` is fit, validate, test or predict."""

    def teardown(self, stage: str) -> None:
        """Clean up after a run, also after an exception."""

    def train_dataloader(self) -> Any:
        """Return an iterable of training batches."""

    def val_dataloader(self) -> Any:
        """Return one iterable of validation batches, or a list of them."""

    def test_dataloader(self) -> Any:
        """Return one iterable of test batches, or a list of them."""

    def predict_dataloader(self) -> Any:
        """Return one iterable of batches to predict, or a list of them."""


def make_transfer(backend: Backend, *owners: Any) -> Callable[[Any, int], Any]:
    """Return ``transfer(batch, dataloader_idx)``: the owners' hooks around the backend's own move.

    Args:
        backend: moves the tensors.
        *owners: datamodule, then module; the first that overrides a hook gives it.
    """
    found: dict[str, Callable[..., Any]] = {}
    for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
        for owner in owners:
            if owner is not None and is_overridden(name, owner, BatchHooks):
                found.setdefault(name, getattr(owner, name))
    if not found:
        return lambda batch, dataloader_idx: backend.batch_to_device(batch)
    before, move, after = (
        found.get(n) for n in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    )

    def transfer(batch: Any, dataloader_idx: int) -> Any:
        if before is not None:
            batch = before(batch, dataloader_idx)
        batch = backend.batch_to_device(batch) if move is None else move(batch, backend.device, dataloader_idx)
        return batch if after is None else after(batch, dataloader_idx)

    return transfer
