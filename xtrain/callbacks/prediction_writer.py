"""`BasePredictionWriter`: predictions go to files as they are made, instead of into a list."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

from xtrain.callbacks.base import Callback
from xtrain.errors import ConfigurationError, explain

if TYPE_CHECKING:
    from xtrain.module import LightningModule
    from xtrain.trainer import Trainer


class WriteInterval(str, Enum):
    """When predictions are written."""

    BATCH = "batch"
    EPOCH = "epoch"
    BATCH_AND_EPOCH = "batch_and_epoch"


class BasePredictionWriter(Callback):
    """Derive from it to write predictions; every rank writes its own part.

    Args:
        write_interval: ``"batch"``, ``"epoch"`` or ``"batch_and_epoch"``.

    Raises:
        ConfigurationError: for another interval.

    Example:
        >>> class Saved(BasePredictionWriter):
        ...     def write_on_batch_end(self, trainer, module, prediction, batch_indices, batch, batch_idx, loader):
        ...         torch.save(prediction, f"{trainer.global_rank}_{batch_idx}.pt")
        >>> Trainer(callbacks=[Saved("batch")]).predict(module, loader, return_predictions=False)  # doctest: +SKIP
    """

    needs_indices = True

    def __init__(self, write_interval: str = "batch") -> None:
        intervals = [interval.value for interval in WriteInterval]
        if write_interval not in intervals:
            fix = f"{type(self).__name__}('batch')"
            raise ConfigurationError(explain(f"write_interval out of {intervals}", repr(write_interval), fix))
        self.interval = WriteInterval(write_interval)

    @property
    def needs_predictions(self) -> bool:
        """Whether the predictions of the whole epoch must be kept for it."""
        return self.interval is not WriteInterval.BATCH

    def write_on_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one prediction.

        Args:
            trainer: the Trainer.
            module: the module.
            prediction: what ``predict_step`` returned.
            batch_indices: where the rows of the batch are in the dataset; None if its loader has no indices.
            batch: on the device.
            batch_idx: the number of the batch on this rank, from 0.
            dataloader_idx: the number of the loader, from 0.
        """

    def write_on_epoch_end(
        self, trainer: Trainer, module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write all predictions of this rank.

        Args:
            trainer: the Trainer.
            module: the module.
            predictions: one per batch; of several loaders a list of such lists.
            batch_indices: for each loader a list with the indices of each batch; None without indices.
        """

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write a batch, if that is asked for."""
        if self.interval is not WriteInterval.EPOCH and trainer.run is not None:
            seen = trainer.run.indices[dataloader_idx]
            indices = None if seen is None else seen[batch_idx]
            self.write_on_batch_end(trainer, module, outputs, indices, batch, batch_idx, dataloader_idx)

    def on_predict_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the epoch, if that is asked for."""
        if self.needs_predictions and trainer.run is not None:
            self.write_on_epoch_end(trainer, module, trainer.run.predictions, trainer.run.indices)
