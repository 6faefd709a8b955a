"""The accelerator backend with the CPU as the accelerator; on a real device with ``pytest -m accelerator``."""

from typing import ClassVar

import pytest
import torch
from xtrain_backends.accelerator import Accelerator

from xtrain import ConfigurationError, register_backend
from xtrain.contract import Situation
from xtrain.precision import PRECISIONS as PRECISIONS_BY_NAME
from xtrain.testing import BackendConformance

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")


@register_backend
class CpuAsAccelerator(Accelerator):
    name, rules = "accelerator-on-cpu", ()
    available = classmethod(lambda cls: None)
    _count = lambda self: 4  # noqa: E731
    _start = lambda self, number: torch.device("cpu")  # noqa: E731


class TestCpuAsAccelerator(BackendConformance):
    backend, precisions = "accelerator-on-cpu", PRECISIONS
    tolerances: ClassVar = dict.fromkeys(PRECISIONS, 1e-6)


@pytest.mark.accelerator
class TestAccelerator(BackendConformance):
    backend, precisions = "accelerator", PRECISIONS


def test_more_processes_than_devices_are_refused():
    backend = CpuAsAccelerator()
    backend.devices = 5
    with pytest.raises(ConfigurationError, match=r"at most 4 processes, one per device\. Received: 5"):
        backend.launch()


@pytest.mark.parametrize("rule", Accelerator.rules, ids=lambda rule: rule.id)
def test_rules_ask_torch_about_the_device(rule):
    backend = Accelerator()
    situation = Situation(backend, PRECISIONS_BY_NAME["16-mixed"], [])
    assert rule.check(situation) is None  # on the CPU
    backend.device = torch.device("vulkan")  # of which torch knows the name, and which it can do neither on
    assert "16-mixed on vulkan" in rule.check(situation)


def test_without_a_device_it_says_what_to_do():
    assert torch.accelerator.is_available() or "use backend='cpu'" in Accelerator.available()
