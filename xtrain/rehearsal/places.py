"""The user's own lines: in tracebacks, in running code, and where layers and optimizers were made."""

from __future__ import annotations

import ast
import inspect
import linecache
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

_MADE_AT = "_made_at"
PACKAGE = Path(__file__).resolve().parent.parent
_OPTIMIZERS = os.path.join(os.path.dirname(torch.__file__), "optim")  # noqa: PTH118, PTH120
_LIBRARIES = tuple(
    os.path.join(os.path.realpath(folder), "")  # noqa: PTH118  # a prefix of file names
    for folder in (
        Path(torch.__file__).parent,
        PACKAGE,
        PACKAGE.parent / "backends",
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("platstdlib"),
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
    )
)


class Place(NamedTuple):
    """A line of a file."""

    file: str | None
    line: int | None


NOWHERE = Place(None, None)


@cache
def is_users(file: str) -> bool:
    """Return whether `file` is code that the user wrote: not of Python, torch, xtrain or an installed package."""
    if file.startswith("<"):  # <frozen importlib>, <string>
        return file.startswith("<ipython")
    path = os.path.realpath(file)
    return not path.startswith(_LIBRARIES) and f"{os.sep}site-packages{os.sep}" not in path


def current_place() -> Place:
    """Return the innermost line of the user's code that runs now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_outermost(frame.f_code.co_filename, frame.f_code.co_name):
        if is_users(frame.f_code.co_filename):
            return Place(os.path.realpath(frame.f_code.co_filename), frame.f_lineno)
        frame = frame.f_back
    return NOWHERE


def direct_place(*watchers: str) -> Place:
    """Return the innermost line of the user's code, unless xtrain or an optimizer of torch is what it called.

    Args:
        *watchers: files whose frames do not count: the one that asks, and what stands in for methods of torch.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if is_users(file):
            return Place(os.path.realpath(file), frame.f_lineno)
        if file.startswith((str(PACKAGE), str(PACKAGE.parent / "backends"), _OPTIMIZERS)) and file not in watchers:
            return NOWHERE
        frame = frame.f_back
    return NOWHERE


def _is_outermost(file: str, name: str) -> bool:
    """Return whether this is where a child begins: below it, a fork has the lines that asked for the rehearsal."""
    return name == "serve" and file.endswith(os.path.join("rehearsal", "child.py"))  # noqa: PTH118


def place_in_stack(text: str) -> Place:
    """Return the innermost line of the user's code in a stack as `faulthandler` writes it, innermost first."""
    for file, line, name in re.findall(r'File "(.+?)", line (\d+) in (.+)', text):
        if _is_outermost(file, name):
            break
        if is_users(file):
            return Place(file, int(line))
    return NOWHERE


def place_of_error(error: BaseException) -> Place:
    """Return the innermost line of the user's code in the traceback of `error`, or of what caused it."""
    if isinstance(error, SyntaxError) and error.filename and is_users(error.filename):
        return Place(os.path.realpath(error.filename), error.lineno)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_users(frame.filename):
            return Place(os.path.realpath(frame.filename), frame.lineno)
    return place_of_error(error.__cause__) if error.__cause__ is not None else NOWHERE


def users_traceback(error: BaseException) -> str:
    """Return the traceback of `error` with the user's code only."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_users(frame.filename)]
    head = ["Traceback (your code only):\n", *traceback.format_list(frames)] if frames else []
    return "".join([*head, *traceback.format_exception_only(type(error), error)]).rstrip()


def source_line(file: str | None, line: int | None) -> str:
    """Return that line of the source, stripped; empty if it cannot be read."""
    return "" if file is None or line is None else linecache.getline(file, line).strip()


def shown(file: str) -> str:
    """Return `file` as a person would write it: relative to the working directory, if it is below."""
    path = Path(file)
    try:
        return path.relative_to(Path.cwd()).as_posix()
    except ValueError:
        return file


# ---------------------------------------------------------------- where something was made


@contextmanager
def noting() -> Iterator[None]:
    """Note where layers, optimizers and loaders are made that are made inside."""
    classes: list[Any] = [nn.Module, torch.optim.Optimizer, DataLoader]
    originals = [cls.__init__ for cls in classes]
    for cls, original in zip(classes, originals, strict=True):
        cls.__init__ = _noted(original)
    try:
        yield
    finally:
        for cls, original in zip(classes, originals, strict=True):
            cls.__init__ = original


def _noted(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def init(self: Any, *arguments: Any, **options: Any) -> None:
        vars(self).setdefault(_MADE_AT, current_place())
        original(self, *arguments, **options)

    return init


def place_of_optimizer(optimizer: Any, module: nn.Module) -> Place:
    """Return where a raw optimizer was made, or where ``configure_optimizers`` begins."""
    place: Place = vars(optimizer).get(_MADE_AT, NOWHERE)
    return place if place.line else place_of_method(module, "configure_optimizers")


def place_of_loader(loader: Any, module: nn.Module) -> Place:
    """Return where a loader was made, or where the module's ``train_dataloader`` begins, if it has one."""
    place: Place = getattr(loader, "__dict__", {}).get(_MADE_AT, NOWHERE)
    if place.line or "train_dataloader" not in vars(type(module)):
        return place
    return place_of_method(module, "train_dataloader")


def place_of_layer(module: nn.Module, name: str) -> Place:
    """Return where the layer `name` (as in ``named_modules``) was made; if nobody noted it, where it is assigned."""
    try:
        place: Place = vars(module.get_submodule(name)).get(_MADE_AT, NOWHERE) if name else NOWHERE
    except AttributeError:
        place = NOWHERE
    if place.line:
        return place
    return _assignment(module, name.split(".")[0]) if name else place_of_class(module)


def place_of_class(module: Any) -> Place:
    """Return where the class of `module` begins."""
    return _beginning(type(module))


def place_of_method(module: Any, name: str) -> Place:
    """Return where a method of the user's class begins, or the class if it has none."""
    found = getattr(type(module), name, None)
    place = _beginning(found) if inspect.isfunction(found) else NOWHERE
    return place if place.file and is_users(place.file) else place_of_class(module)


def _beginning(what: Any) -> Place:
    try:
        lines, start = inspect.getsourcelines(what)
        skipped = next((i for i, line in enumerate(lines) if line.lstrip().startswith(("class ", "def ", "async "))), 0)
        return Place(os.path.realpath(inspect.getsourcefile(what) or ""), start + skipped)
    except (OSError, TypeError):
        return NOWHERE


def _assignment(module: Any, attribute: str) -> Place:
    """Return the line of ``self.ATTRIBUTE = ...`` in the user's classes."""
    for cls in type(module).__mro__:
        file = inspect.getsourcefile(cls) if is_users(getattr(inspect.getmodule(cls), "__file__", "") or "<") else None
        if file is None:
            continue
        start = _beginning(cls)
        try:
            tree = ast.parse("".join(inspect.getblock(linecache.getlines(file)[(start.line or 1) - 1 :])))
        except (SyntaxError, IndentationError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Assign):
                continue
            if any(isinstance(t, ast.Attribute) and t.attr == attribute for t in node.targets):
                return Place(os.path.realpath(file), (start.line or 1) - 1 + node.lineno)
    return place_of_class(module)
