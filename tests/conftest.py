"""What every test starts from: one thread, a fixed seed, fixed examples, and no backend registered by another file."""

import pytest
import torch
from hypothesis import settings

from xtrain import registry

settings.register_profile("reproducible", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("reproducible")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(1)


@pytest.fixture(autouse=True)
def _own_backends_only(request, monkeypatch):
    own = {name: cls for name, cls in registry._registered.items() if cls.__module__ == request.module.__name__}
    monkeypatch.setattr(registry, "_registered", own)
