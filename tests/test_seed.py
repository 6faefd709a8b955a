"""`seed_everything`: which generators it seeds, and what it refuses."""

import random

import numpy as np
import pytest
import torch
from small import says
from torch.utils.data import DataLoader

from xtrain import ConfigurationError, seed_everything


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Leave the environment and the generators as they were."""
    monkeypatch.setenv("XTRAIN_SEED", "0")
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


def drawn():
    order = [int(row) for row in DataLoader(range(8), shuffle=True)]
    return random.random(), float(np.random.rand()), torch.rand(3).tolist(), order


def test_every_generator_starts_over():
    assert seed_everything(5) == 5
    first = drawn()
    assert all(new != old for new, old in zip(drawn(), first, strict=True))
    seed_everything(5)
    assert drawn() == first
    seed_everything(6)
    assert all(new != old for new, old in zip(drawn(), first, strict=True))


def test_processes_that_start_later_inherit_the_seed():
    seed_everything(9)
    first = drawn()
    assert seed_everything() == 9
    assert drawn() == first


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, "5"])
def test_meaningless_seed(seed):
    with pytest.raises(ConfigurationError) as caught:
        seed_everything(seed)
    says(caught.value, "0 to 2**32 - 1", repr(seed), "seed_everything(42)")


@pytest.mark.parametrize("inherited", ["many", "-1", "4294967296"])
def test_meaningless_seed_in_the_environment(inherited, monkeypatch):
    monkeypatch.setenv("XTRAIN_SEED", inherited)
    with pytest.raises(ConfigurationError) as caught:
        seed_everything()
    says(caught.value, f"XTRAIN_SEED={inherited}")
