"""Seeding of every random generator a training run uses."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from xtrain.errors import ConfigurationError, explain


def seed_everything(seed: int | None = None, workers: bool = False) -> int:
    """Seed Python's, NumPy's (if it is imported) and torch's generators, on every device.

    Give every rank the same seed, so that they make the same module: inside of a run on several processes,
    torch draws other numbers on each of them anyway.

    Args:
        seed: 0 to 2**32 - 1; None takes ``XTRAIN_SEED`` from the environment, or 0.
        workers: accepted as in Lightning; torch seeds loader workers from its own generator.

    Returns:
        The seed. It is also written to ``XTRAIN_SEED``, for the processes started later.

    Raises:
        ConfigurationError: if it is out of range or not an int.
    """
    chosen = int(os.environ.get("XTRAIN_SEED", "0")) if seed is None else seed
    if isinstance(chosen, bool) or not isinstance(chosen, int) or not 0 <= chosen < 2**32:
        raise ConfigurationError(explain("a seed from 0 to 2**32 - 1", repr(seed), "seed_everything(42)"))
    os.environ["XTRAIN_SEED"] = str(chosen)
    random.seed(chosen)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(chosen)
    torch.manual_seed(chosen)
    return chosen


@contextmanager
def stream_of_rank(rank: int, device: torch.device) -> Iterator[None]:
    """Let torch draw other numbers on each rank inside the context, and the same on all of them after it.

    Noise and dropout that are the same on every rank would make the ranks' gradients less than they could
    be worth. Python's and NumPy's generators are left alone: what a step decides with them stays common.

    Args:
        rank: of this process.
        device: where it draws, besides the CPU.
    """
    seed = int(torch.randint(2**62, ()))  # from the common stream, so that a second run draws something else
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed + rank)
        yield
