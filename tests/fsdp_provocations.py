"""A run for each rule that only the fsdp backend has."""

import torch

from xtrain.testing.experiments.closures import Closure
from xtrain.testing.misuse import Provocation


class Early(Closure):
    """Makes its optimizer before the Trainer shards the parameters."""

    def __init__(self):
        super().__init__(torch.optim.Adam)
        self.early = torch.optim.Adam(self.D.parameters())

    def configure_optimizers(self):
        return self.early


class Together(Closure):
    """A fused optimizer over a network and a parameter on the module itself."""

    def __init__(self):
        super().__init__(torch.optim.Adam)
        self.scalar = torch.nn.Parameter(torch.ones(()))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), fused=True)


PROVOCATIONS = {
    "fsdp-early": Provocation(Early),
    "fsdp-together": Provocation(Together),
    "fsdp-sparse": Provocation(lambda: Closure(torch.optim.SparseAdam)),
}
