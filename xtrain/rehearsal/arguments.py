"""``--init KEY=VALUE``: arguments of the user's class, with the types of its signature."""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xtrain.errors import ConfigurationError, MissingDependencyError, explain

_WORDS = {"true": True, "false": False, "null": None, "none": None, "~": None}


def read_init(given: Sequence[str], make: Callable[..., Any]) -> dict[str, Any]:
    """Return the arguments for `make`, a class or a function.

    Args:
        given: ``"lr=1e-3"``, or the path of a configuration (``config.yaml``, ``.json``), whose ``model`` section
            is taken if it has one.
        make: what they are for.

    Raises:
        ConfigurationError: for a name that `make` does not take, a value of another type, or a missing one.
    """
    name = getattr(make, "__name__", "the class")
    values: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        values.update({key.strip(): value} if equals else _configuration(text))
    signature = inspect.signature(make)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for key in values:
        if key not in signature.parameters and not takes_all:
            known = ", ".join(signature.parameters) or "no arguments"
            closest = difflib.get_close_matches(key, signature.parameters, n=1)
            fix = f"--init {closest[0]}={values[key]}" if closest else f"def __init__(self, {key})"
            raise ConfigurationError(explain(f"arguments of {name} out of: {known}", key, fix))
    required = [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind not in (2, 4)]
    missing = [key for key in required if key not in values]
    if missing:
        fix = " ".join(f"--init {key}=..." for key in missing) + ", or --init config.yaml"
        raise ConfigurationError(explain(f"a value for each argument of {name}", f"none for {', '.join(missing)}", fix))
    hints = _hints(make)
    return {key: _typed(key, value, hints.get(key)) for key, value in values.items()}


def _hints(make: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(make.__init__ if isinstance(make, type) else make)  # type: ignore[misc]
    except Exception:  # an annotation that cannot be evaluated is no reason not to train
        return {}


def _configuration(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            explain("KEY=VALUE, or a file", f"{path!r} ({error.strerror})", "--init lr=1e-3")
        ) from error
    found = json.loads(text) if path.endswith(".json") else _yaml(text)
    for section in ("fit", "model", "init_args"):
        found = found.get(section, found) if isinstance(found, dict) else found
    if not isinstance(found, dict):
        raise ConfigurationError(explain(f"{path} to hold arguments by name", f"{found!r:.60}", "lr: 1e-3"))
    return found


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        needed = "a package that reads YAML"
        raise MissingDependencyError(explain(needed, str(error), "pip install 'xtrain-torch[cli]'")) from error
    return yaml.safe_load(text)


def _typed(key: str, value: Any, hint: Any) -> Any:
    """Return `value`, text or what a configuration holds, as `hint` wants it."""
    wanted = [kind for kind in _kinds(hint) if kind is not type(None)]
    if wanted == [str]:
        return None if type(None) in _kinds(hint) and value in ("null", "None") else str(value)
    value = parsed(value) if isinstance(value, str) else value
    for kind in wanted:
        origin = typing.get_origin(kind) or kind
        if isinstance(origin, type) and isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
            return value
    if value is None or not wanted:
        return value
    first = typing.get_origin(wanted[0]) or wanted[0]
    if first is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if first is tuple and isinstance(value, list):
        return tuple(value)
    if first is Path:
        return Path(value)
    if first in (int, float, bool):
        raise ConfigurationError(explain(f"{key} as {first.__name__}", repr(value), f"--init {key}={first(1)}"))
    return value


def _kinds(hint: Any) -> tuple[Any, ...]:
    if hint is None:
        return ()
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def parsed(text: str) -> Any:
    """Return what `text` says, as YAML would: numbers, true, null, [1, 2]; anything else is text.

    Example:
        >>> from xtrain.rehearsal.arguments import parsed
        >>> parsed("1e-3"), parsed("[64, 128]"), parsed("true"), parsed("relu")
        (0.001, [64, 128], True, 'relu')
    """
    if text.strip().lower() in _WORDS:
        return _WORDS[text.strip().lower()]
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text
