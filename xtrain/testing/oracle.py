"""What all hand-written training loops share: the oracle of the experiments, in plain PyTorch.

Nothing of xtrain is imported. A loop is written as its author would write it without any framework, on the full
batch and on one device; `Plain` hides the precision and counts the steps. The loops themselves are beside the
modules that they are compared with, in `xtrain.testing.experiments`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from xtrain.testing.networks import Batch, adam, networks, regression, sgd

Notes = dict[str, list[Any]]
Clip = Callable[[list[nn.Parameter]], Tensor]

SCALE = 2.0**10
"""Loss scale of the hand-written fp16 loops: a power of two, so scaling itself never rounds."""


class Plain(nn.Module):
    """The state of a hand-written loop: two networks, the data, autocast, counters.

    Args:
        precision: one of the names of `xtrain.precision.PRECISIONS`.
        data: one epoch of global batches.
        epochs: how often the data is repeated.
        device: where the loop runs.
        max_steps: stop after so many training steps in which an optimizer moved; -1 is never.
    """

    def __init__(
        self, precision: str, data: list[Batch], epochs: int = 1, device: str = "cpu", max_steps: int = -1
    ) -> None:
        super().__init__()
        self.autocast_dtype = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(precision)
        self.dtype = {"16-true": torch.float16, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
        self.scale = SCALE if precision == "16-mixed" else 1.0
        self.device = device
        self.G, self.D = networks()
        self.to(device, self.dtype)
        self.data = [(x.to(device, self.dtype), z.to(device, self.dtype)) for x, z in data]
        self.epochs, self.max_steps = epochs, max_steps
        self.notes: Notes = {}
        self.step_count: list[int] = []
        self.idle_steps = 0  # steps without a gradient: they do nothing, and their training step counts
        self.global_step = 0

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return the context of one forward pass.

        Without autocast's weight cache, in which a network used twice would sum the gradients of both
        uses in half precision.
        """
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device, self.autocast_dtype, cache_enabled=False)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Add the unscaled gradients of `loss` to those that are there, whatever the precision."""
        if self.scale == 1.0:
            loss.backward(**kwargs)
            return
        earlier = [(p, p.grad) for p in self.parameters()]
        self.zero_grad()
        (loss * self.scale).backward(**kwargs)
        for parameter, before in earlier:
            new = None if parameter.grad is None else parameter.grad / self.scale
            parameter.grad = before if new is None else new if before is None else before + new

    def count_steps_of(self, *optimizers: Optimizer) -> None:
        """Count the steps of `optimizers` with torch's own hook."""
        self.step_count = [0] * len(optimizers)

        def counter(index: int) -> Callable[..., None]:
            def count(*_: object) -> None:
                self.step_count[index] += 1

            return count

        for index, optimizer in enumerate(optimizers):
            optimizer.register_step_post_hook(counter(index))

    def steps(self) -> Iterator[tuple[int, int, Batch]]:
        """Yield epoch, index and batch; a step in which any optimizer stepped counts for `global_step`."""
        for epoch in range(self.epochs):
            for index, batch in enumerate(self.data):
                before = self.idle_steps + sum(self.step_count)
                yield epoch, index, batch
                self.global_step += self.idle_steps + sum(self.step_count) > before
                if self.global_step == self.max_steps:
                    return

    def note(self, **values: Any) -> None:
        """Append to the lists that are compared with what the xtrain module noted."""
        for name, value in values.items():
            self.notes.setdefault(name, []).append(value)


def gan_optimizers(run: Plain) -> tuple[Optimizer, Optimizer]:
    """Return the pair nearly every experiment uses: SGD for G, Adam for D."""
    pair = sgd(run.G.parameters()), adam(run.D.parameters())
    run.count_steps_of(*pair)
    return pair


def one_optimizer(run: Plain) -> Optimizer:
    """Return SGD over D, for the experiments with a single optimizer."""
    optimizer = sgd(run.D.parameters())
    run.count_steps_of(optimizer)
    return optimizer


def forward_regression(run: Plain, batch: Batch) -> Tensor:
    """Return the supervised loss, computed in the run's precision."""
    with run.forward_context():
        return regression(run.D, *batch)


def clip_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Clip to norm 0.2, which is below the true norms, and return the norm before."""
    return clip_grad_norm_(parameters, 0.2)
