"""The cpu backend, held to the conformance suite. It computes as plain PyTorch does, so rounding is the same."""

from xtrain.testing import BackendConformance


class TestCpu(BackendConformance):
    backend = "cpu"
    precisions = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
    tolerances = dict.fromkeys(precisions, 1e-6)
