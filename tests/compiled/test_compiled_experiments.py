"""Every experiment of the conformance suite with ``compile="step"``, on the backend ``cpu``."""

from xtrain.testing.compiled import CompiledConformance


class TestCpu(CompiledConformance):
    backend = "cpu"
