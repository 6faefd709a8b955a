"""Notices when Python asks for a value of a device tensor in the middle of a step, or moves one to a GPU, and where.

Every such question launches what was traced so far and waits for it: the step becomes several graphs.
The methods of `torch.Tensor` that ask are wrapped while a run goes on, and look at a flag of their
thread first, so replicas in threads of one process do not see each other.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from xtrain.errors import ConfigurationError, explain

_MOVING = ("to", "cuda")
_ASKING = ("item", "tolist", "numpy", "cpu", "to", "nonzero", "__bool__", "__float__", "__int__", "__index__")
_SHOWING = ("__repr__", "__format__")
_NOT_THE_USER = tuple(
    str(Path(file).parent) for file in (torch.__file__, sys.modules["xtrain"].__file__, __file__) if file
)

_thread = threading.local()
_lock = threading.Lock()
_installed: list[Any] = [0, {}]  # number of runs, and the attributes of torch.Tensor before the first of them


class HostSyncs:
    """What one run reports.

    Args:
        report: is given a sentence, once per line of the user's code.
        before: is given the line, before the device is asked.
    """

    def __init__(self, report: Callable[[str], None], before: Callable[[str], None]) -> None:
        self._report, self._before = report, before

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Report what happens inside, in this thread."""
        before = getattr(_thread, "watcher", None)
        _thread.watcher = self
        try:
            yield
        finally:
            _thread.watcher = before

    def seen(self, method: str) -> None:
        """Report a call of ``Tensor.method``."""
        line = user_line()
        self._before(line)
        self._report(
            f"{line} asks for a value (Tensor.{method}), so the step waits there for the device and becomes "
            "several graphs. Keep it a tensor: self.log takes it as it is, torch.where replaces `if`."
        )


def user_line() -> str:
    """Return file and line of the innermost frame that is neither torch nor xtrain."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USER):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def install() -> None:
    """Wrap the methods; every call needs its own `uninstall`, in the same thread."""
    _thread.runs = _runs() + 1
    with _lock:
        _installed[0] += 1
        if _installed[0] == 1:
            for name in dict.fromkeys((*_MOVING, *_ASKING, *_SHOWING)):
                _installed[1][name] = torch.Tensor.__dict__.get(name)
                setattr(torch.Tensor, name, _wrapped(name, getattr(torch.Tensor, name)))


def uninstall() -> None:
    """Restore torch when the last run has ended."""
    _thread.runs -= 1
    with _lock:
        _installed[0] -= 1
        if _installed[0] == 0:
            for name, own in _installed[1].items():
                delattr(torch.Tensor, name)
                if own is not None:
                    setattr(torch.Tensor, name, own)


def _runs() -> int:
    return int(getattr(_thread, "runs", 0))


def _wrapped(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        target = _target(arguments, options) if name == "to" else "cuda" if name == "cuda" else "cpu"
        if target == "cuda" and _runs():
            fix = f"remove .{name}(...) at {user_line()}; self.device is the right one"
            raise ConfigurationError(explain("tensors on the device of the run", f"a move to {target}", fix))
        watcher = getattr(_thread, "watcher", None)
        if watcher is None or self.device.type != "xla" or target != "cpu":
            return method(self, *arguments, **options)
        _thread.watcher = None  # what the method itself calls is the same question
        try:
            watcher.seen(name)
            return method(self, *arguments, **options)
        finally:
            _thread.watcher = watcher

    return call


def _target(arguments: tuple[Any, ...], options: dict[str, Any]) -> str | None:
    """Return the type of the device that ``Tensor.to`` is asked for, None if it stays where it is."""
    target = options.get("device", arguments[0] if arguments else None)
    if isinstance(target, torch.Tensor):
        target = target.device
    return torch.device(target).type if isinstance(target, str | torch.device) else None
