"""Copies of a child process: each begins with the same state of everything, the user's own generators included."""

from __future__ import annotations

import os
import pickle
import selectors
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from xtrain.rehearsal.child import real_exit
from xtrain.rehearsal.findings import Finding
from xtrain.rehearsal.incidents import incident
from xtrain.rehearsal.places import place_of_error

T = TypeVar("T")


def can_copy() -> bool:
    """Return whether this system can copy a process."""
    return hasattr(os, "fork")


def in_copy(function: Callable[[], T], seconds: float | None = None) -> T | Finding:
    """Call `function` in a copy of this process, wait for it, and return what it returned.

    Args:
        function: its result must be such that it can be pickled.
        seconds: how long to wait; None: as long as it takes.

    Returns:
        The result, or the finding for what the user's code raised.

    Raises:
        RuntimeError: if the copy ended without an answer, or by an error that is not the user's.
        TimeoutError: if it did not answer in time; it is ended then.
    """
    return in_copies([function], seconds)[0]


def in_copies(functions: Sequence[Callable[[], T]], seconds: float | None = None) -> list[T | Finding]:
    """Call each of `functions` in a copy of its own, all at once; see `in_copy`."""
    copies = [_Copy(function) for function in functions]
    try:
        _read(copies, None if seconds is None else time.monotonic() + seconds)
    finally:
        for copy in copies:
            copy.end()
    return [copy.answer() for copy in copies]


class _Copy:
    """A copy of this process, and what it has said so far."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.pipe, writing = os.pipe()
        self.text, self.told, self._status = bytearray(), False, 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads: the copy uses one
            self._pid = os.fork()
        if not self._pid:
            os.close(self.pipe)
            _answer(function, writing)
        os.close(writing)

    def end(self) -> None:
        """Wait for its end, which is near if it has told everything; else bring it about."""
        if not self.told:
            os.kill(self._pid, signal.SIGKILL)
        self._status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        os.close(self.pipe)

    def answer(self) -> Any:
        if not self.told:
            raise TimeoutError("a copy of the process did not answer in time")
        if not self.text:
            raise RuntimeError(f"a copy of the process ended with status {self._status}, without an answer")
        answer = pickle.loads(self.text)
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer[0]


def _read(copies: Sequence[_Copy], deadline: float | None) -> None:
    """Read from all copies until each has told everything, or it is too late."""
    with selectors.DefaultSelector() as selector:
        for copy in copies:
            selector.register(copy.pipe, selectors.EVENT_READ, copy)
        while selector.get_map():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return
            for key, _ in selector.select(left):
                part = os.read(key.fd, 2**20)
                key.data.text += part
                if not part:
                    key.data.told = True
                    selector.unregister(key.fd)


def _answer(function: Callable[[], Any], writing: int) -> None:
    """Write the result as a tuple of one, or the text of an error, and end the copy."""
    try:
        torch.set_num_threads(1)  # the pool of threads is not copied
        answer = _result(lambda: pickle.dumps((function(),)))
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(answer[0] if isinstance(answer[0], bytes) else pickle.dumps(answer))
    finally:
        real_exit(0)


def _result(function: Callable[[], Any]) -> tuple[Any] | str:
    try:
        return (function(),)
    except BaseException as error:
        place = place_of_error(error)
        if place.file is None and not isinstance(error, SystemExit):
            return f"{type(error).__name__}: {error}"
        return (incident(error, place),)
