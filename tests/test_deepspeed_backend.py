"""DeepSpeed beyond the common suite: every stage, two processes, offloading, configuration, rules."""

from functools import partial

import pytest

from ranks import Ranks
from xtrain.testing import BackendConformance
from xtrain.testing.experiments import EXPERIMENTS, PRECISIONS, expect, perform
from xtrain.testing.suite import TOLERANCES

pytest.importorskip("deepspeed", exc_type=ImportError)


def start():
    import deepspeed  # noqa: F401
    import xtrain.testing  # noqa: F401


@pytest.fixture(scope="module")
def pair():
    ranks = Ranks(2, start)
    yield ranks
    ranks.close()


def same_as_torch(pair, experiment, precision, options):
    outcomes = pair.run(partial(perform, experiment, "deepspeed", precision, options))
    suite = BackendConformance()
    suite.tolerances = TOLERANCES
    suite.compare(outcomes, expect(experiment, precision), precision)


ALLOWED = [e for e in EXPERIMENTS if e.name not in ("lbfgs", "shared-layer")]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("experiment", [e for e in ALLOWED if not e.scaling], ids=str)
def test_two_processes_train_as_one(pair, experiment, stage):
    same_as_torch(pair, experiment, "32-true", {"stage": stage})
