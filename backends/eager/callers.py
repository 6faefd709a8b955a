"""Whose code calls torch: the user's, or code that knows how a backend keeps tensors."""

from __future__ import annotations

import linecache
from collections.abc import Collection
from types import FrameType

_OURS = ("xtrain", "xtrain_backends")
_NAIVE = ("xtrain.callbacks", "xtrain.testing")  # written as the user's code is


def user_frame(frame: FrameType | None, knowing: Collection[str], through: Collection[str] = ()) -> FrameType | None:
    """Return the frame that called torch, if it is the user's.

    Args:
        frame: the innermost one to look at.
        knowing: packages beside xtrain that know how the backend keeps tensors.
        through: modules that stand in for a part of torch: their caller counts.

    Returns:
        The first frame outside of torch; None if it, or one of torch on the way there, knows.
    """
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name not in through:
            if _is_in(name, (*_OURS, *knowing)) and not _is_in(name, _NAIVE):
                return None
            if not _is_in(name, ("torch",)):
                return frame
        frame = frame.f_back
    return None


def line_of(frame: FrameType) -> str:
    """Return the line of source that `frame` is at, or ``...``."""
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip() or "..."


def _is_in(name: str, packages: Collection[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)
