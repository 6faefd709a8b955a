"""Validation between training steps, and validation, test and prediction alone."""

# ruff: noqa: D102 - hooks are documented where `xtrain.hooks` declares them
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xtrain.testing.comparison import Experiment
from xtrain.testing.experiments.accumulation import Accumulate
from xtrain.testing.networks import Batch, batches
from xtrain.testing.oracle import Plain, forward_regression, one_optimizer
from xtrain.testing.recorder import OneOptimizer


class WithValidation(Accumulate):
    """Gradients accumulated over two batches survive a validation after every batch."""

    def on_fit_start(self) -> None:
        self.G.eval()  # not in __init__, where it might have been forgotten, and would be told

    def modes(self) -> list[bool]:
        """Return ``training`` of the module and of its networks, and whether gradients are recorded."""
        return [self.training, self.G.training, self.D.training, torch.is_grad_enabled()]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.note(modes=self.modes())
        super().training_step(batch, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.note(validation_modes=self.modes())
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.note(validation_loss=self.trainer.callback_metrics["val_loss"])


def with_validation(run: Plain) -> None:
    """Gradients accumulated over two batches survive the validation in between; G is the user's to keep in eval."""
    opt = one_optimizer(run)
    run.G.eval()
    reference = run.data[0][0]
    held_out = [(x.to(reference), z.to(reference)) for x, z in batches(2, seed=5)]
    for _, index, batch in run.steps():
        run.note(modes=[run.training, run.G.training, run.D.training, torch.is_grad_enabled()])
        run.backward(forward_regression(run, batch) / 2)
        if (index + 1) % 2 == 0:
            opt.step()
            opt.zero_grad()
        losses = []
        for batch_out in held_out:
            run.note(validation_modes=[False, False, False, False])
            with torch.no_grad():
                losses.append(forward_regression(run, batch_out).float())
        run.note(validation_loss=torch.stack(losses).mean())


class Evaluated(OneOptimizer):
    """Validation, test and prediction without training."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("loss", self.loss(batch), batch_size=len(batch[0]), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        outputs: Tensor = self.D(batch[0])
        return outputs


def predictions(run: Plain) -> list[Tensor]:
    """Return D's outputs for the data, without gradients, in the run's precision."""
    run.eval()
    with torch.no_grad(), run.forward_context():
        return [run.D(x) for x, _ in run.data]


def evaluation_loss(run: Plain) -> Any:
    """Return the mean loss over the data, without gradients, in the run's precision."""
    run.eval()
    with torch.no_grad():
        return torch.stack([forward_regression(run, batch).float() for batch in run.data]).mean()


EXPERIMENTS = (
    Experiment("validation-between", WithValidation, with_validation, trainer={"val_check_interval": 1}, validation=2),
)
