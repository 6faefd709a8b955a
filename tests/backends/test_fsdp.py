"""The fsdp backend, held to the conformance suite."""

from fsdp_provocations import PROVOCATIONS

from xtrain.testing import BackendConformance


class TestFsdp(BackendConformance):
    backend = "fsdp"
    precisions = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
    direct_calls = False
    early_gradients = False  # before they are reduced they are not in .grad
    sequence_examples = 10
    provocations = PROVOCATIONS
