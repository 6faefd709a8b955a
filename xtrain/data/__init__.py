"""Where batches come from, and which of them each rank sees."""

from xtrain.data.loaders import LightningDataModule as LightningDataModule
