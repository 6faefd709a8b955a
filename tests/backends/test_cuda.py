"""The cuda backend: its logic on the CPU, everything on a GPU where there is one (``pytest -m cuda``)."""

import os
import subprocess
import sys

import pytest
import torch
from xtrain_backends.cuda import CUDA
from xtrain_backends.eager.backend import EagerBackend

from xtrain import ConfigurationError, register_backend
from xtrain.testing import BackendConformance

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")


@register_backend
class CudaLogic(CUDA):
    name, rules = "cuda-logic", ()
    available = classmethod(lambda cls: None)
    launch = lambda self: setattr(self, "device", torch.device("cpu"))  # noqa: E731
    state_dict = lambda self: EagerBackend.state_dict(self)  # noqa: E731  # without the GPU's generator


class TestCudaLogic(BackendConformance):
    backend, options, precisions = "cuda-logic", {"pin_memory": False}, PRECISIONS
    tolerances = dict.fromkeys(PRECISIONS, 1e-6)


@pytest.mark.cuda
class TestCuda(BackendConformance):
    backend, precisions, oracle_device = "cuda", PRECISIONS, "cuda"


def test_more_processes_than_gpus_are_refused():
    backend, count = CUDA(), torch.cuda.device_count()
    backend.devices = count + 1
    with pytest.raises(
        ConfigurationError, match=f"at most {count} processes, one per visible GPU. Received: {count + 1}"
    ):
        backend.launch()


def test_without_a_gpu_it_says_what_to_do():
    code = "import xtrain; xtrain.Trainer(backend='cuda').fit(xtrain.LightningModule())"
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=hidden, capture_output=True, text=True, timeout=120)
    assert "BackendUnavailableError: Backend 'cuda' cannot run here: " in done.stderr
