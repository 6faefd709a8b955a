"""What every test starts from: one thread, a fixed seed, fixed examples, and no backend registered by another file."""

import os

import pytest
import torch
from hypothesis import settings

from xtrain import registry
from xtrain.launch.join import _read_launch


def pytest_addoption(parser):
    parser.addoption("--precision", help="of the conformance suite, run what is about this precision")


def pytest_collection_modifyitems(config, items):
    chosen = config.getoption("--precision")
    if chosen is not None:
        config.hook.pytest_deselected(items=[item for item in items if precision_of(item) not in (None, chosen)])
        items[:] = [item for item in items if precision_of(item) in (None, chosen)]


def precision_of(item):
    """Return what a test is about. Those of a suite that are about none run once, with its first precision."""
    given = getattr(item, "callspec", None)
    own = None if given is None else given.params.get("precision")
    return own or getattr(item.cls, "precisions", (None,))[0]


settings.register_profile("reproducible", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("reproducible")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    """Every test begins with the same random numbers; a seed that one puts into the environment ends with it."""
    os.environ.pop("XTRAIN_SEED", None)
    torch.manual_seed(1)
    yield
    os.environ.pop("XTRAIN_SEED", None)


@pytest.fixture(autouse=True)
def _own_backends_only(request, monkeypatch):
    own = {name: cls for name, cls in registry._registered.items() if cls.__module__ == request.module.__name__}
    monkeypatch.setattr(registry, "_registered", own)


@pytest.fixture(autouse=True)
def _no_launch_is_remembered():
    """A process reads its launcher's variables once; a test that sets some is a process of its own here."""
    _read_launch.cache_clear()
    yield
    _read_launch.cache_clear()
