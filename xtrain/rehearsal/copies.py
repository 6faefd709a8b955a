"""Copies of a child process: each begins with the same state of everything, the user's own generators included."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable
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


def in_copy(function: Callable[[], T]) -> T | Finding:
    """Call `function` in a copy of this process, wait for it, and return what it returned.

    Args:
        function: it and its result must be such that the result can be pickled.

    Returns:
        The result, or the finding for what the user's code raised.

    Raises:
        RuntimeError: if the copy ended without an answer, or by an error that is not the user's.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads: the copy uses one
        pid = os.fork()
    if not pid:
        os.close(reading)
        _answer(function, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if not text:
        raise RuntimeError(f"a copy of the process ended with status {status}, without an answer")
    answer = pickle.loads(text)
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer[0]  # type: ignore[no-any-return]


def _answer(function: Callable[[], Any], writing: int) -> None:
    """Write the result as a tuple of one, or the text of an error, and end the copy."""
    try:
        torch.set_num_threads(1)  # the pool of threads is not copied
        answer = _result(function)
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(answer, pipe)
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
