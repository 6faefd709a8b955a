"""The fsdp backend on two real processes, held to the conformance suite: each has half of every batch."""

from typing import ClassVar

import pytest
from fsdp_provocations import PROVOCATIONS

from xtrain.testing import BackendConformance
from xtrain.testing.ranks import Ranks


class TestFsdpTwoProcesses(BackendConformance):
    backend = "fsdp"
    precisions = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
    # As the cpu backend on two processes: each rank rounds the gradient of its own half of the batch.
    tolerances: ClassVar = {"32-true": 1e-6, "bf16-mixed": 1e-2, "16-mixed": 1.5e-3, "bf16-true": 4e-2}
    tolerances |= {"bf16-mixed-lbfgs": 0.2, "bf16-true-lbfgs": 0.2}  # the line search magnifies rounding
    direct_calls = False
    early_gradients = False  # before they are reduced they are not in .grad
    sequence_examples = 10
    provocations = PROVOCATIONS

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _processes(cls):
        cls.ranks = Ranks(2)
        yield
        cls.ranks.close()

    def launch(self, job):
        return self.ranks.run(job, 30.0)
