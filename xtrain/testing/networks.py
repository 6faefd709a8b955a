"""What both sides of every comparison share: two tiny networks, their data, their losses.

Only torch is used here. Everything random is drawn on the CPU from a seeded generator, so that every
device and every rank starts from the same numbers, and optimizers are chosen so that rounding errors
stay as small as they are: SGD with momentum, and Adam with an `eps` far above the gradients' noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

Batch = tuple[Tensor, Tensor]
Parameters = Any  # what torch's optimizers take: parameters or groups of them

HIDDEN = 6
ROWS = 8
"""Rows of a global batch: every world size up to eight that is a power of two divides it."""


class Mlp(nn.Module):
    """Two layers with a tanh between them: ``(rows, inputs)`` to ``(rows, outputs)``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(inputs, HIDDEN), nn.Linear(HIDDEN, outputs)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the outputs."""
        outputs: Tensor = self.last(torch.tanh(self.first(rows)))
        return outputs


def networks(seed: int = 7) -> tuple[Mlp, Mlp]:
    """Return generator (3 -> 4) and discriminator (4 -> 1), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    pair = Mlp(3, 4), Mlp(4, 1)
    with torch.no_grad():
        for network in pair:
            for parameter in network.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return pair


def batches(count: int, world_size: int = 1, rank: int = 0, seed: int = 11) -> list[Batch]:
    """Return one epoch of data: this rank's rows of each global batch.

    Args:
        count: number of batches.
        world_size: number of ranks that share a global batch.
        rank: which share to return.
        seed: another seed gives other data, for validation.

    Returns:
        Pairs of samples ``(8 / world_size, 4)`` and latents ``(8 / world_size, 3)``.
    """
    generator = torch.Generator().manual_seed(seed)
    x, z = (torch.randn(count, ROWS, width, generator=generator) for width in (4, 3))
    return [(x[i, rank::world_size], z[i, rank::world_size]) for i in range(count)]


def sgd(parameters: Parameters) -> torch.optim.SGD:
    """Return the first optimizer of the experiments."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam(parameters: Parameters) -> torch.optim.Adam:
    """Return the second optimizer of the experiments."""
    return torch.optim.Adam(parameters, lr=0.02, eps=1e-3)


def d_loss(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's loss (0-dim): real samples are 1, generated ones are 0."""
    on_real, on_fake = discriminator(real), discriminator(fake.detach())
    return binary_cross_entropy_with_logits(on_real, torch.ones_like(on_real)) + binary_cross_entropy_with_logits(
        on_fake, torch.zeros_like(on_fake)
    )


def g_loss(discriminator: nn.Module, fake: Tensor) -> Tensor:
    """Return the generator's loss (0-dim); its gradient reaches the discriminator too."""
    on_fake = discriminator(fake)
    return binary_cross_entropy_with_logits(on_fake, torch.ones_like(on_fake))


def regression(discriminator: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    """Return a plain supervised loss (0-dim) for experiments with one network."""
    return mse_loss(discriminator(x).squeeze(1), z.sum(1))
