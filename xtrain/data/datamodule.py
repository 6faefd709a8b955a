"""DataModules, and the way of a batch to the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import Parameter, signature
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from xtrain.contract import Backend
from xtrain.data.batches import size_of
from xtrain.hooks import BatchHooks, is_overridden
from xtrain.hparams import KeepsHyperParameters

_STAGES = ("train", "val", "test", "predict")


class LightningDataModule(KeepsHyperParameters, BatchHooks):
    """Keeps the loaders of an experiment together; override what is needed.

    `prepare_data` runs on one process per host (downloads), `setup` on all. `save_hyperparameters` keeps the
    arguments of its ``__init__``, as in a module; they go to the loggers beside the module's.

    Attributes:
        trainer: the Trainer of the current or last run.
        prepare_data_per_node: False prepares on one host only, for a disk that all of them see.

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
    prepare_data_per_node: bool = True

    @classmethod
    def from_datasets(
        cls,
        train_dataset: Any = None,
        val_dataset: Any = None,
        test_dataset: Any = None,
        predict_dataset: Any = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **kwargs: Any,
    ) -> LightningDataModule:
        """Return a DataModule whose loaders read the given datasets; only training shuffles.

        Args:
            train_dataset: a dataset, or a list or dict of them, each with a loader.
            val_dataset: of validation, in the same forms.
            test_dataset: of testing.
            predict_dataset: of prediction.
            batch_size: rows per batch; ``__init__`` gets it as well if it has an argument of this name.
            num_workers: processes per loader; the same.
            **kwargs: of the class's ``__init__``.

        Example:
            >>> print(LightningDataModule.from_datasets(torch.randn(8, 3), batch_size=2))
            LightningDataModule(train: 4 batches)
        """
        known = signature(cls).parameters
        any_name = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in known.values())
        both = {"batch_size": batch_size, "num_workers": num_workers}
        module = cls(**{name: value for name, value in both.items() if any_name or name in known}, **kwargs)
        given = {"train": train_dataset, "val": val_dataset, "test": test_dataset, "predict": predict_dataset}
        for stage, datasets in given.items():
            if datasets is not None:
                loaders = partial(_loaders, datasets, stage == "train", batch_size, num_workers)
                setattr(module, f"{stage}_dataloader", loaders)
        return module

    def __str__(self) -> str:
        """Return the number of batches per stage; loaders that are not ready yet are left out."""
        parts = [f"{stage}: {size} batches" for stage in _STAGES if (size := self._batches(stage)) is not None]
        return f"{type(self).__name__}({', '.join(parts)})"

    def _batches(self, stage: str) -> Any:
        try:
            loader = getattr(self, f"{stage}_dataloader")()
        except Exception:  # a dataset that `setup` will make
            return None
        return [size_of(part) for part in loader] if isinstance(loader, list | tuple) else size_of(loader)

    def __getstate__(self) -> dict[str, Any]:
        # Loader workers may get it, and copies are free of the run.
        return {**self.__dict__, "trainer": None}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint should keep of it."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""

    def on_exception(self, exception: BaseException) -> None:
        """When a run is about to end by `exception`, a KeyboardInterrupt included."""

    def prepare_data(self) -> None:
        """Download or write files; runs on one process per host."""

    def setup(self, stage: str) -> None:
        """Make datasets; `stage` is fit, validate, test or predict."""

    def teardown(self, stage: str) -> None:
        """Clean up after a run, also after an exception."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Before a checkpoint is written; add keys to it, or look at it. All ranks come here."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """After a checkpoint was read, before anything is taken from it: what is changed in it counts."""

    def train_dataloader(self) -> Any:
        """Return an iterable of training batches."""

    def val_dataloader(self) -> Any:
        """Return one iterable of validation batches, or a list of them."""

    def test_dataloader(self) -> Any:
        """Return one iterable of test batches, or a list of them."""

    def predict_dataloader(self) -> Any:
        """Return one iterable of batches to predict, or a list of them."""


def _loaders(datasets: Any, shuffle: bool, batch_size: int, workers: int) -> Any:
    """Return a loader per dataset, in the structure of `datasets`."""
    if isinstance(datasets, dict):
        return {name: _loaders(dataset, shuffle, batch_size, workers) for name, dataset in datasets.items()}
    if isinstance(datasets, list | tuple):
        return [_loaders(dataset, shuffle, batch_size, workers) for dataset in datasets]
    shuffle = shuffle and not isinstance(datasets, IterableDataset)
    return DataLoader(datasets, batch_size, shuffle=shuffle, num_workers=workers)


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
