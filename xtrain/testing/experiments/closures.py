"""Steps with a closure, which the optimizer evaluates once (Adam) or several times (LBFGS)."""

# ruff: noqa: D102 - hooks are documented where `xtrain.hooks` declares them
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from xtrain.contract import Capabilities
from xtrain.precision import Precision
from xtrain.testing.comparison import Experiment
from xtrain.testing.experiments.scaling import BROKEN, SCALED, OneOverflowing
from xtrain.testing.networks import Batch, adam, regression
from xtrain.testing.oracle import Plain, forward_regression, one_optimizer
from xtrain.testing.recorder import Recorder


class Closure(Recorder):
    """The step is given a closure, by keyword as in the specification or by position.

    Args:
        make: the optimizer.
        positional: how the closure is passed.
    """

    def __init__(self, make: Callable[..., Any] = adam, positional: bool = False) -> None:
        super().__init__()
        self.make, self.positional = make, positional

    def configure_optimizers(self) -> Any:
        return self.make(self.D.parameters())

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()

        def closure() -> Tensor:
            loss = regression(self.D, *batch)
            opt.zero_grad()
            self.manual_backward(loss)
            return loss

        loss = opt.step(closure) if self.positional else opt.step(closure=closure)
        self.note(loss=loss)


def closure(run: Plain, make: Callable[..., Optimizer]) -> None:
    """A step that evaluates the loss itself, as often as the optimizer likes."""
    opt: Any = make(run.D.parameters())
    run.count_steps_of(opt)
    for _, _, batch in run.steps():

        def evaluate(batch: Batch = batch) -> Tensor:
            loss = forward_regression(run, batch)
            opt.zero_grad()
            run.backward(loss)
            return loss

        run.note(loss=opt.step(evaluate))


def lbfgs(parameters: Any) -> torch.optim.LBFGS:
    """Return an LBFGS that evaluates its closure several times a step."""
    return torch.optim.LBFGS(parameters, lr=0.3, max_iter=3, history_size=3)


class SkippedClosure(OneOverflowing):
    """A step with a closure is skipped like any other and still returns its loss."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        self.index = batch_idx

        def closure() -> Tensor:
            loss = regression(self.D, *batch)
            opt.zero_grad()
            self.manual_backward(loss)
            return loss

        loss = opt.step(closure)
        self.note(loss=loss, applied=opt.applied)


def skipped_closure(run: Plain) -> None:
    """A step with a closure is skipped like any other and still returns its loss."""
    opt = one_optimizer(run)
    for _, index, batch in run.steps():
        loss: Tensor = forward_regression(run, batch)
        opt.zero_grad()
        run.backward(loss)
        if index not in BROKEN:
            opt.step()
        run.note(loss=loss, applied=index not in BROKEN)


def refuses_lbfgs(capabilities: Capabilities, precision: Precision) -> str | None:
    """LBFGS needs whole parameters and unscaled gradients."""
    if precision.loss_scaling:
        return "lbfgs-scaling"
    return None if capabilities.reevaluating_closures else "lbfgs-backend"


EXPERIMENTS = (
    Experiment("closure", Closure, partial(closure, make=adam)),
    Experiment("closure-positional", partial(Closure, positional=True), partial(closure, make=adam)),
    Experiment("lbfgs", partial(Closure, lbfgs), partial(closure, make=lbfgs), refused=refuses_lbfgs),
    Experiment("scaling-closure", SkippedClosure, skipped_closure, **SCALED),
)
