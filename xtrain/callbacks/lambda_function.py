"""`LambdaCallback`: hooks given as functions."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from xtrain.callbacks.base import Callback, hook_names
from xtrain.errors import ConfigurationError, explain


class LambdaCallback(Callback):
    """A callback made of functions, one per hook.

    Args:
        **hooks: a function per hook of `Callback`, by its name and with its arguments.

    Raises:
        ConfigurationError: for a name that is no hook, or a value that cannot be called.

    Example:
        >>> end = LambdaCallback(on_train_epoch_end=lambda trainer, module: print(trainer.current_epoch))
    """

    def __init__(self, **hooks: Callable[..., Any]) -> None:
        known = hook_names()
        for name, function in hooks.items():
            if name not in known or not callable(function):
                closest = (difflib.get_close_matches(name, known, n=1) or ["on_train_epoch_end"])[0]
                received = f"{name}={function!r:.60}"
                fix = f"LambdaCallback({closest}=lambda trainer, module, *rest: ...)"
                raise ConfigurationError(explain("functions named as the hooks of xtrain.Callback", received, fix))
            setattr(self, name, function)
