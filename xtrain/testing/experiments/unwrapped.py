"""torch's own optimizer and backward instead of xtrain's: allowed where nothing is lost by it, refused elsewhere."""

# ruff: noqa: D102 - hooks are documented where `xtrain.hooks` declares them
from __future__ import annotations

import torch

from xtrain.testing.comparison import Experiment
from xtrain.testing.experiments.accumulation import accumulate
from xtrain.testing.networks import Batch, sgd
from xtrain.testing.oracle import Plain, forward_regression
from xtrain.testing.recorder import OneOptimizer


class RawOptimizer(OneOptimizer):
    """The torch optimizer itself steps, past its wrapper."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers().optimizer
        assert type(opt) is torch.optim.SGD
        opt.zero_grad()
        self.manual_backward(self.loss(batch) / 2)
        opt.step()


def raw_optimizer(run: Plain) -> None:
    """Steps of the torch optimizer itself are not counted."""
    opt = sgd(run.D.parameters())
    run.step_count = [0]
    for _, _, batch in run.steps():
        opt.zero_grad()
        run.backward(forward_regression(run, batch) / 2)
        opt.step()


class DirectBackward(OneOptimizer):
    """``loss.backward()`` instead of ``self.manual_backward(loss)``."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        opt.zero_grad()
        self.loss(batch).backward()
        opt.step()


def accumulate_once(run: Plain) -> None:
    """One step per batch."""
    accumulate(run, every=1)


RAW_OPTIMIZER = Experiment("raw-optimizer", RawOptimizer, raw_optimizer)

DIRECT_BACKWARD = Experiment("direct-backward", DirectBackward, accumulate_once)
