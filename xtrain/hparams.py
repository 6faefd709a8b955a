"""``self.save_hyperparameters()``: the arguments of an ``__init__``, kept and logged."""

from __future__ import annotations

import inspect
from argparse import Namespace
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

from xtrain.errors import ConfigurationError, explain


class HyperParameters(dict[str, Any]):
    """Saved arguments, as a dict whose items are also attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(f"no hyperparameter {name!r}; saved are {sorted(self)}") from error

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self:
            raise AttributeError(f"no hyperparameter {name!r}; saved are {sorted(self)}")
        del self[name]


class KeepsHyperParameters:
    """A class whose ``__init__`` may keep its arguments in `hparams`: a LightningModule or a LightningDataModule."""

    _log_hparams = True

    @property
    def hparams(self) -> HyperParameters:
        """What `save_hyperparameters` kept."""
        kept: HyperParameters = vars(self).setdefault("_hparams", HyperParameters())
        return kept

    @property
    def hparams_initial(self) -> HyperParameters:
        """What `save_hyperparameters` kept, without what was set in `hparams` since."""
        return HyperParameters(vars(self).get("_hparams_initial", {}))

    def save_hyperparameters(self, *names: Any, ignore: Iterable[str] | str | None = None, logger: bool = True) -> None:
        """Keep the arguments of the calling ``__init__`` in ``self.hparams``.

        Args:
            *names: which ones (none means all), or one dict or `argparse.Namespace` to keep instead.
            ignore: names to leave out, and to drop where a base class has kept them.
            logger: also send them to the loggers when a run starts.

        Raises:
            ConfigurationError: for a name that is no argument, or a call from elsewhere.

        Example:
            >>> class Model(LightningModule):
            ...     def __init__(self, lr=0.1, token=""):
            ...         super().__init__()
            ...         self.save_hyperparameters(ignore="token")
            >>> Model(lr=0.3).hparams.lr
            0.3
        """
        frame = inspect.currentframe()
        ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
        values = read_hyperparameters(names, ignored, self, None if frame is None else frame.f_back)
        self._log_hparams = logger
        for kept in (vars(self).setdefault("_hparams_initial", HyperParameters()), self.hparams):
            kept.update(values)
            for name in ignored & kept.keys():
                del kept[name]


def merged(owners: Iterable[KeepsHyperParameters]) -> dict[str, Any]:
    """Return what all of `owners` kept, for the loggers.

    Args:
        owners: a DataModule and a module.

    Raises:
        ConfigurationError: for a name that they kept with different values.
    """
    values: dict[str, Any] = {}
    for owner in owners:
        for name, value in owner.hparams.items():
            if name in values and not _same(values[name], value):
                received = f"{name}={values[name]!r:.60} and {name}={value!r:.60}"
                fix = f"self.save_hyperparameters(ignore={name!r}) in one of them, or logger=False"
                raise ConfigurationError(explain("one value of a name in module and DataModule", received, fix))
            values[name] = value
    return values


def _same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (RuntimeError, TypeError, ValueError):  # arrays and tensors, which compare by item
        return repr(one) == repr(other)


def read_hyperparameters(
    chosen: tuple[Any, ...], ignored: set[str], owner: Any, frame: FrameType | None
) -> dict[str, Any]:
    """Return the hyperparameters that a call of ``save_hyperparameters`` means.

    Args:
        chosen: names of arguments, or one dict or `argparse.Namespace`; empty means all arguments.
        ignored: names to leave out.
        owner: the module.
        frame: the frame of the caller, an ``__init__``.

    Raises:
        ConfigurationError: for a name that is no argument, or another caller.
    """
    if len(chosen) == 1 and isinstance(chosen[0], Mapping | Namespace):
        values = dict(chosen[0]) if isinstance(chosen[0], Mapping) else vars(chosen[0])
        return {name: value for name, value in values.items() if name not in ignored}
    arguments = _arguments(owner, frame)
    missing = sorted(str(name) for name in chosen if name not in arguments)
    if missing:
        fix = "self.save_hyperparameters('lr', 'hidden') or self.save_hyperparameters({'lr': lr})"
        raise ConfigurationError(explain(f"names out of {sorted(arguments)}", ", ".join(missing), fix))
    return {name: arguments[name] for name in (chosen or arguments) if name not in ignored}


def _arguments(owner: Any, frame: FrameType | None) -> dict[str, Any]:
    """Return the arguments of the ``__init__`` that runs in `frame`, and of those of derived classes that called it."""
    if not _is_init_of(owner, frame):
        fix = "def __init__(self, lr): super().__init__(); self.save_hyperparameters()"
        raise ConfigurationError(explain("save_hyperparameters() to be called in __init__", "another caller", fix))
    arguments: dict[str, Any] = {}
    while frame is not None and _is_init_of(owner, frame):
        arguments.update(_arguments_in(frame))  # what the user passed: the outermost call is the last
        frame = frame.f_back
    return arguments


def _is_init_of(owner: Any, frame: FrameType | None) -> bool:
    """Return whether `frame` runs a method of `owner` (an ``__init__``, unless something odd called)."""
    names = () if frame is None else frame.f_code.co_varnames
    return bool(names) and frame is not None and frame.f_locals.get(names[0]) is owner


def _arguments_in(frame: FrameType) -> dict[str, Any]:
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount
    arguments = {name: frame.f_locals[name] for name in code.co_varnames[1:count] if name in frame.f_locals}
    if code.co_flags & inspect.CO_VARKEYWORDS:
        has_varargs = bool(code.co_flags & inspect.CO_VARARGS)
        arguments.update(frame.f_locals[code.co_varnames[count + has_varargs]])
    return arguments
