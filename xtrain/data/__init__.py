"""Where batches come from, and which of them each rank sees."""

from xtrain.data.datamodule import LightningDataModule as LightningDataModule
