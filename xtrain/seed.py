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

    Example:
        >>> seed_everything(7)
        7
        >>> first = torch.rand(2)
        >>> bool(seed_everything(7)) and torch.equal(first, torch.rand(2))
        True
    """
    inherited = os.environ.get("XTRAIN_SEED", "0")
    chosen = (int(inherited) if inherited.isdecimal() else inherited) if seed is None else seed
    if isinstance(chosen, bool) or not isinstance(chosen, int) or not 0 <= chosen < 2**32:
        received = f"XTRAIN_SEED={inherited}" if seed is None else repr(seed)
        raise ConfigurationError(explain("a seed from 0 to 2**32 - 1", received, "seed_everything(42)"))
    os.environ["XTRAIN_SEED"] = str(chosen)
    random.seed(chosen)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(chosen)
    torch.manual_seed(chosen)
    return chosen


@contextmanager
def isolate_rng(include_cuda: bool = True) -> Iterator[None]:
    """Give Python's, NumPy's and torch's generators back the states they had before the context.

    Args:
        include_cuda: those of the GPUs too, if one was used.
    """
    numpy = sys.modules.get("numpy")
    devices = range(torch.cuda.device_count()) if include_cuda and torch.cuda.is_initialized() else ()
    python, numpys = random.getstate(), None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(numpys)
