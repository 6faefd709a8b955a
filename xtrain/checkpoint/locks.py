"""A lock that dies with its process: who writes to a folder."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from xtrain.errors import CheckpointError, explain

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows has no locks of this kind: nothing is noticed there
    fcntl = None

_held: dict[str, int] = {}  # descriptors by path: the system's locks are per process, and lost when a file is closed
_guard = threading.Lock()


class Lock:
    """A lock on a file, for processes and for the threads of this one.

    Args:
        path: the file; it is made when the lock is taken.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._key = path, os.path.realpath(path)

    def take(self) -> bool:
        """Take the lock; returns False if somebody else has it."""
        if fcntl is None:
            return True
        with _guard:
            if self._key in _held:
                return False
            number = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                os.close(number)
                return False
            except OSError:  # a file system without locks
                os.close(number)
                return True
            with suppress(OSError):  # only a text for people
                os.truncate(number, 0)
                os.write(number, f"{os.getpid()}\n".encode())
            _held[self._key] = number
            return True

    def release(self) -> None:
        """Give the lock back; does nothing if it was not taken."""
        with _guard:
            number = _held.pop(self._key, None)
            if number is not None:
                os.close(number)

    def held_elsewhere(self) -> bool:
        """Return whether anybody has the lock, another process or this one."""
        if self._key in _held:
            return True
        if fcntl is None or not self._path.exists():
            return False
        taken = self.take() and self._key in _held
        self.release()
        return not taken  # a file system without locks cannot tell: leave it alone

    def owner(self) -> str:
        """Return the number of the process that took the lock last, as text."""
        with suppress(OSError):
            return self._path.read_text(encoding="utf-8").strip() or "?"
        return "?"


PATIENCE = 10.0
"""Seconds to wait for a process that is about to end."""

_owners: dict[str, tuple[object, int]] = {}


class FolderHold:
    """A folder of checkpoints that one run writes to, until `release`."""

    def __init__(self, lock: Lock, key: str) -> None:
        self._lock, self._key = lock, key

    def release(self) -> None:
        """Let other runs write there."""
        owner, count = _owners.pop(self._key, (None, 0))
        if count > 1:
            _owners[self._key] = owner, count - 1
        elif count == 1:
            self._lock.release()


def hold_folder(folder: Path, owner: object) -> FolderHold:
    """Take a folder for a run, together with other callbacks of the same one.

    Args:
        folder: it is made if it is missing.
        owner: the run's Trainer.

    Raises:
        CheckpointError: if another run writes there, or if nobody can.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fix = "ModelCheckpoint(dirpath='...') that can be written to"
        raise CheckpointError(explain(f"to make {folder}", f"{type(error).__name__}: {error}", fix)) from error
    lock, key = Lock(folder / ".lock"), os.path.realpath(folder)
    known, count = _owners.get(key, (owner, 0))
    if count and known is owner:
        _owners[key] = owner, count + 1
        return FolderHold(lock, key)
    limit = time.monotonic() + PATIENCE
    try:
        while not lock.take():
            if time.monotonic() > limit:
                fix = "ModelCheckpoint(dirpath='another folder'), or end that process first"
                expected = f"{folder} to be written to by one run"
                raise CheckpointError(explain(expected, f"another one there, process {lock.owner()}", fix))
            time.sleep(0.1)
    except OSError as error:
        fix = "ModelCheckpoint(dirpath='...') that can be written to"
        raise CheckpointError(explain(f"to write to {folder}", f"{type(error).__name__}: {error}", fix)) from error
    _owners[key] = owner, 1
    return FolderHold(lock, key)
