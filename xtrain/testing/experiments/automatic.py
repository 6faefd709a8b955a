"""Automatic optimization: the training step returns its loss, and the Trainer does what the loop does."""

# ruff: noqa: D102 - hooks are documented where `xtrain.hooks` declares them
from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.lr_scheduler import ExponentialLR

from xtrain.testing.comparison import Experiment
from xtrain.testing.experiments.clipping import refuses_values
from xtrain.testing.experiments.scaling import BROKEN, SCALED, OneOverflowing
from xtrain.testing.networks import Batch, regression
from xtrain.testing.oracle import Plain, forward_regression, one_optimizer
from xtrain.testing.recorder import OneOptimizer


class Automatic(OneOptimizer):
    """Automatic optimization: the step returns its loss, the Trainer does the rest.

    Args:
        interval: when the Trainer steps the scheduler, ``"epoch"`` or ``"step"`` (then every second one).
    """

    def __init__(self, interval: str = "epoch") -> None:
        super().__init__()
        self.automatic_optimization = True
        self.interval = interval

    def configure_optimizers(self) -> Any:
        opt = super().configure_optimizers()
        frequency = 2 if self.interval == "step" else 1
        config = {"scheduler": ExponentialLR(opt, 0.7), "interval": self.interval, "frequency": frequency}
        return {"optimizer": opt, "lr_scheduler": config}

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.note(lr=self.optimizers().param_groups[0]["lr"])
        return {"loss": self.loss(batch)}


def automatic(run: Plain, every: int = 1, algorithm: str | None = None, step_interval: bool = False) -> None:
    """Step after every N batches, and at the epoch's end with what has accumulated by then."""
    opt = one_optimizer(run)
    scheduler = ExponentialLR(opt, 0.7)
    parameters = list(run.D.parameters())
    for _, index, batch in run.steps():
        run.note(lr=opt.param_groups[0]["lr"])
        last = index + 1 == len(run.data)
        run.backward(forward_regression(run, batch) / every)
        if (index + 1) % every and not last:
            continue
        if algorithm == "norm":
            clip_grad_norm_(parameters, 0.2)
        elif algorithm == "value":
            clip_grad_value_(parameters, 0.03)
        opt.step()
        opt.zero_grad()
        if (step_interval and (index + 1) % 2 == 0) or (last and not step_interval):
            scheduler.step()


class AutomaticOverflow(OneOverflowing):
    """In automatic optimization a skipped step does not move the learning rate either."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True

    def configure_optimizers(self) -> Any:
        opt = super().configure_optimizers()
        return {"optimizer": opt, "lr_scheduler": {"scheduler": ExponentialLR(opt, 0.8), "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.index = batch_idx
        self.note(lr=self.optimizers().param_groups[0]["lr"])
        return regression(self.D, *batch)


def automatic_overflow(run: Plain) -> None:
    """In automatic optimization a skipped step does not move the learning rate either."""
    opt = one_optimizer(run)
    scheduler = ExponentialLR(opt, 0.8)
    for _, index, batch in run.steps():
        run.note(lr=opt.param_groups[0]["lr"])
        opt.zero_grad()
        run.backward(forward_regression(run, batch))
        if index not in BROKEN:
            opt.step()
            scheduler.step()


EXPERIMENTS = (
    Experiment("automatic", Automatic, automatic, epochs=3),
    Experiment(
        "automatic-accumulate",
        Automatic,
        partial(automatic, every=2),
        batches=5,
        epochs=2,
        trainer={"accumulate_grad_batches": 2},
    ),
    Experiment(
        "automatic-accumulate-clip",
        Automatic,
        partial(automatic, every=2, algorithm="norm"),
        batches=5,
        epochs=2,
        trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.2},
    ),
    Experiment(
        "automatic-value",
        Automatic,
        partial(automatic, algorithm="value"),
        trainer={"gradient_clip_val": 0.03, "gradient_clip_algorithm": "value"},
        refused=refuses_values,
    ),
    Experiment("automatic-schedule", partial(Automatic, "step"), partial(automatic, step_interval=True), epochs=2),
    Experiment("scaling-automatic", AutomaticOverflow, automatic_overflow, **SCALED),
)
