"""Arguments of the Trainer from the environment, as Lightning reads them: ``PL_TRAINER_MAX_EPOCHS=3``."""

from __future__ import annotations

import ast
import inspect
import os
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

Init = TypeVar("Init", bound=Callable[..., None])
_PREFIX = "PL_TRAINER_"


def environment_defaults(*more: str) -> Callable[[Init], Init]:
    """Return a decorator of ``Trainer.__init__`` that takes what is not given from the environment.

    Args:
        *more: names that are taken beside those in the signature.
    """

    def decorate(init: Init) -> Init:
        names = [name for name in (*inspect.signature(init).parameters, *more) if name not in ("self", "others")]

        @wraps(init)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
            found = {name: os.environ.get(_PREFIX + name.upper()) for name in names[len(args) :]}
            read = {name: _value(text) for name, text in found.items() if text is not None}
            init(self, *args, **{**read, **kwargs})

        return cast("Init", wrapper)

    return decorate


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
