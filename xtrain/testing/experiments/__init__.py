"""The experiments, by subject: what must mean the same on every backend.

Each file holds, side by side, modules as users write them, the hand-written loops in plain PyTorch that say what
they must come to, and the rows of the table. A class and the function of the same name do the same and note the
same values; the function uses nothing of xtrain.
"""

from xtrain.testing.comparison import Experiment, Outcome, as_loader, expect, make_trainer, outcome_of, perform
from xtrain.testing.experiments import (
    accumulation,
    automatic,
    backward,
    clipping,
    closures,
    evaluation,
    gan,
    parameters,
    scaling,
    schedules,
    toggling,
)

__all__ = ["EXPERIMENTS", "Experiment", "Outcome", "as_loader", "expect", "make_trainer", "outcome_of", "perform"]

EXPERIMENTS: tuple[Experiment, ...] = (
    *gan.EXPERIMENTS,
    *clipping.EXPERIMENTS,
    *accumulation.EXPERIMENTS,
    *backward.EXPERIMENTS,
    *toggling.EXPERIMENTS,
    *closures.EXPERIMENTS,
    *schedules.EXPERIMENTS,
    *parameters.EXPERIMENTS,
    *automatic.EXPERIMENTS,
    *evaluation.EXPERIMENTS,
    *scaling.EXPERIMENTS,
)
