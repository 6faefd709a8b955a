"""The base of the experiments' LightningModules: two networks, and a record of what a run saw.

Data arrives through the Trainer; no module names a device.
"""

# ruff: noqa: D102 - hooks are documented where `xtrain.hooks` declares them
from __future__ import annotations

from typing import Any

from torch import Tensor

from xtrain import LightningModule
from xtrain.testing.networks import Batch, adam, networks, regression, sgd
from xtrain.testing.oracle import Notes


class Recorder(LightningModule):
    """Two networks with an optimizer each, and notes that are compared with the oracle's."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.G, self.D = networks()
        self.notes: Notes = {}
        self.takes_notes = True

    def note(self, **values: Any) -> None:
        """Append to the notes; tensors are read after the run, so that noting never waits for a device."""
        for name, value in values.items() if self.takes_notes else ():
            self.notes.setdefault(name, []).append(value)

    def configure_optimizers(self) -> Any:
        """Return SGD over G and Adam over D."""
        return sgd(self.G.parameters()), adam(self.D.parameters())

    def clip(self, opt: Any) -> Tensor:
        """Clip to norm 0.2, as the oracle's `clip_norm`."""
        return self.clip_gradients(opt, gradient_clip_val=0.2, gradient_clip_algorithm="norm")


class OneOptimizer(Recorder):
    """SGD over D alone."""

    def configure_optimizers(self) -> Any:
        return sgd(self.D.parameters())

    def loss(self, batch: Batch) -> Tensor:
        """Return the supervised loss."""
        return regression(self.D, *batch)
