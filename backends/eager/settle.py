"""Waits, before the interpreter ends, for threads of torch that still hold tensors: one of them may abort it."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path

_LOOKS = 3
_PAUSE = 0.005  # seconds
_THREADS = Path("/proc/self/task")


def let_threads_settle(seconds: float = 2.0) -> None:
    """Return when no other thread of this process was working in three looks in a row.

    A thread of gloo drops the tensors of a collective a moment after the collective is over, and needs the lock of the
    interpreter for it. If the interpreter has begun to end by then, Python unwinds the thread through C++ code that
    allows no such thing: "terminate called without an active exception", and SIGABRT after a training that went well.
    Destroying the process group would wait for its threads, but caches of torch (of `DTensor`, of a device mesh) keep
    groups alive. Sleeping hands the lock over.

    Args:
        seconds: wait no longer than this, for threads that never rest.
    """
    deadline, quiet = time.monotonic() + seconds, 0
    while quiet < _LOOKS and time.monotonic() < deadline:
        time.sleep(_PAUSE)
        quiet = 0 if _others_work() else quiet + 1


def _others_work() -> bool:
    """Return whether the system says of another thread that it runs or could; nothing is known beside Linux."""
    own = str(threading.get_native_id())
    states = []
    for task in _THREADS.glob("*/stat"):
        with suppress(OSError):  # the thread has ended
            states += [] if task.parent.name == own else [task.read_text().rpartition(")")[2].split()[0]]
    return "R" in states
