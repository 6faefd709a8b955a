"""The 20-line backend of the page "Writing a backend", held to the conformance suite."""

from typing import ClassVar

from pages import ROOT, blocks

from xtrain import register_backend
from xtrain.testing import BackendConformance

PAGE = ROOT / "docs" / "writing-a-backend.md"
(_, CODE), *_ = [block for block in blocks(PAGE, "python") if "(EagerBackend)" in block[1]]
CLASS = CODE.partition("@final")[2].partition("register_backend")[0]
NAMES: dict = {"__name__": __name__}
exec("import torch\nfrom xtrain import Capabilities\nfrom xtrain_backends.eager import EagerBackend" + CLASS, NAMES)
register_backend(NAMES["MyGPU"])


def test_it_has_20_lines():
    assert len([line for line in CLASS.splitlines() if line.strip()]) <= 20


class TestMyGpu(BackendConformance):
    backend = "mygpu"
    precisions = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
    tolerances: ClassVar = dict.fromkeys(precisions, 1e-6)
    sequence_examples = 5
