"""The tpu backend, held to the conformance suite in a rehearsal: real torch_xla on the CPU."""

import os

os.environ["PJRT_DEVICE"] = "CPU"

from xtrain.testing import BackendConformance


class TestTpu(BackendConformance):
    backend = "tpu"
    precisions = ("32-true", "bf16-mixed", "bf16-true")
    # XLA orders sums in its own way, and corrects Adam's bias in fp32 where torch does in Python's floats. In bf16
    # it is as far from the CPU as both are from fp32; LBFGS divides by differences of such gradients.
    tolerances = {"32-true": 1e-5, "bf16-mixed": 2e-2, "bf16-mixed-lbfgs": 1e-1, "bf16-true": 5e-2}
    sequence_examples = 5
