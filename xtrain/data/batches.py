"""How many batches a loader has, and iteration over some of them."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterable, Iterator
from typing import Any

from xtrain.errors import ConfigurationError, explain

END = object()
"""What ``next(batches, END)`` returns when there are no more."""


def size_of(loader: Any, name: str = "") -> int | None:
    """Return the number of batches, or None if the loader does not know.

    Args:
        loader: iterable.
        name: what it is for, said in the error.

    Raises:
        ConfigurationError: if its ``__len__`` fails.
    """
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None
    except Exception as error:
        whose = f"the {name} loader ({type(loader).__name__})".replace("  ", " ")
        expected = f"len() of {whose} to be a number of batches"
        fix = "def __len__(self): return 100, or no __len__ for a loader that does not know: its end is then read ahead"
        raise ConfigurationError(explain(expected, f"{type(error).__name__}: {error}", fix)) from error


def limited(size: int | None, limit: int | float | None, flag: str) -> int | None:
    """Return how many batches of a loader with `size` batches to use; None means all.

    Raises:
        ConfigurationError: for a fraction of an unknown size.
    """
    if limit is None or (isinstance(limit, float) and limit == 1.0):
        return size
    if isinstance(limit, float):
        if size is None:
            fix = f"Trainer({flag}=10)"
            raise ConfigurationError(explain(f"{flag} as a number, since the loader has no length", limit, fix))
        return int(size * limit)
    return limit if size is None else min(size, limit)


def with_last(loader: Iterable[Any], count: int | None, sized: bool) -> Iterator[tuple[Any, bool]]:
    """Yield ``(batch, is_last)`` for the first `count` batches.

    A loader that knows its length is never asked ahead of time. One that does not is read one batch
    ahead, which is the only way to know the last one.
    """
    batches = started(loader) if count is None else itertools.islice(started(loader), count)
    if sized:
        for index, batch in enumerate(batches, 1):
            yield batch, index == count
        return
    current = next(batches, END)
    while current is not END:
        following = next(batches, END)
        yield current, following is END
        current = following


def started(loader: Iterable[Any]) -> Iterator[Any]:
    """Return ``iter(loader)``; where this process handles signals that ask it to end, its workers do not see them."""
    handled = [n for n in _SIGNALS if callable(signal.getsignal(n))] if getattr(loader, "num_workers", 0) else []
    if not handled:
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, handled)  # workers inherit it
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


def nothing_left(flag: str, limit: int | float | None, size: int) -> ConfigurationError:
    """Return the error for a limit that leaves none of `size` batches."""
    received = f"{flag}={limit} of {size} batches"
    return ConfigurationError(explain("a limit that leaves a batch", received, f"Trainer({flag}=1)"))


def empty_loader(name: str) -> ConfigurationError:
    """Return the error for the loader called `name`, which is without batches."""
    return ConfigurationError(
        explain(
            f"at least one batch from the {name} loader",
            "none (a dataset smaller than batch_size while drop_last=True, or one that raises StopIteration? "
            "a generator used up?)",
            "DataLoader(dataset, batch_size=64, drop_last=False)",
        )
    )
