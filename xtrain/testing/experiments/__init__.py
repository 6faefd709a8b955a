"""The experiments, by subject: what must mean the same on every backend.

Each file has the modules as users write them, each followed by the hand-written loop in plain PyTorch that it is
compared with, and the experiments as rows of a table. A class and the function of the same name do the same and
note the same values; the function uses nothing of xtrain but `xtrain.testing.oracle` and `xtrain.testing.networks`.
"""

from xtrain.testing.comparison import Experiment, Outcome, as_loader, expect, make_trainer, outcome_of, perform
from xtrain.testing.experiments.accumulation import EXPERIMENTS as ACCUMULATION
from xtrain.testing.experiments.automatic import EXPERIMENTS as AUTOMATIC
from xtrain.testing.experiments.backward import EXPERIMENTS as BACKWARD
from xtrain.testing.experiments.clipping import EXPERIMENTS as CLIPPING
from xtrain.testing.experiments.closures import EXPERIMENTS as CLOSURES
from xtrain.testing.experiments.evaluation import EXPERIMENTS as EVALUATION
from xtrain.testing.experiments.gan import EXPERIMENTS as GAN
from xtrain.testing.experiments.parameters import EXPERIMENTS as PARAMETERS
from xtrain.testing.experiments.scaling import EXPERIMENTS as SCALING
from xtrain.testing.experiments.schedules import EXPERIMENTS as SCHEDULES
from xtrain.testing.experiments.toggling import EXPERIMENTS as TOGGLING
from xtrain.testing.experiments.unusual import EXPERIMENTS as UNUSUAL

__all__ = ["EXPERIMENTS", "Experiment", "Outcome", "as_loader", "expect", "make_trainer", "outcome_of", "perform"]

EXPERIMENTS: tuple[Experiment, ...] = (
    *GAN,
    *CLIPPING,
    *ACCUMULATION,
    *BACKWARD,
    *TOGGLING,
    *CLOSURES,
    *SCHEDULES,
    *PARAMETERS,
    *AUTOMATIC,
    *EVALUATION,
    *SCALING,
    *UNUSUAL,
)
