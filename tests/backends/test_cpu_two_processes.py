"""The cpu backend on two real processes, held to the conformance suite: each has half of every batch."""

from functools import partial
from typing import ClassVar

import pytest
import rank_jobs

from xtrain.testing import BackendConformance
from xtrain.testing.ranks import Ranks


class TestTwoProcesses(BackendConformance):
    backend = "cpu"
    precisions = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
    # Each rank rounds the gradient of its own half of the batch; the hand-written loop rounds the whole.
    tolerances: ClassVar = {"32-true": 1e-6, "bf16-mixed": 1e-2, "16-mixed": 1.5e-3, "bf16-true": 4e-2}
    tolerances |= {"bf16-mixed-lbfgs": 0.2, "bf16-true-lbfgs": 0.2}  # the line search magnifies rounding
    direct_calls = False
    sequence_examples = 30

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _processes(cls):
        cls.ranks = Ranks(2)
        yield
        cls.ranks.close()

    def launch(self, job):
        return self.ranks.run(job)

    @pytest.mark.parametrize("name", ["edited-gradients", "replaced-gradients", "direct-backward", "raw-step"])
    def test_what_would_miss_the_average_is_refused_on_every_rank(self, name):
        for said in self.ranks.run(partial(rank_jobs.misused, name)):
            assert "the average over processes" in said
            assert "Fix: " in said
