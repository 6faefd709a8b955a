"""``self.save_hyperparameters()``: the arguments of an ``__init__``, kept and logged."""

from __future__ import annotations

import copy
import inspect
import warnings
from argparse import Namespace
from collections.abc import Iterable, Mapping, MutableMapping, MutableSequence
from types import FrameType
from typing import Any

from torch import nn

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
    def hparams(self) -> Any:
        """What `save_hyperparameters` kept: `HyperParameters`, or the configuration object that was given alone."""
        return vars(self).setdefault("_hparams", HyperParameters())

    @property
    def hparams_initial(self) -> Any:
        """What `save_hyperparameters` kept, without what was set in `hparams` since."""
        return copy.copy(vars(self).get("_hparams_initial", HyperParameters()))

    def save_hyperparameters(
        self,
        *names: Any,
        ignore: Iterable[str] | str | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Keep the arguments of the calling ``__init__`` in ``self.hparams``.

        Args:
            *names: which ones (none means all), or one dict or `argparse.Namespace` to keep instead. A configuration
                object, such as OmegaConf's, is kept as it is.
            ignore: names to leave out, and to drop where a base class has kept them.
            frame: that of an ``__init__`` whose arguments they are; default: of the caller.
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
        here = inspect.currentframe()
        frame = frame or (None if here is None else here.f_back)
        ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
        values = read_hyperparameters(names, ignored, self, frame)
        self._log_hparams = logger
        if len(names) == 1 and _is_config(names[0]) and not ignored & names[0].keys():
            vars(self).update(_hparams=names[0], _hparams_initial=copy.deepcopy(names[0]))
            return
        _warn_of_modules(values)
        for place in ("_hparams_initial", "_hparams"):
            kept = vars(self)[place] = HyperParameters({**vars(self).get(place, {}), **values})
            for name in ignored & kept.keys():
                del kept[name]


def plain_containers(value: Any) -> Any:
    """Return `value` with the mappings and sequences of configuration objects as dicts and lists."""
    if type(value) in (dict, HyperParameters) or (isinstance(value, Mapping) and not isinstance(value, dict)):
        return {name: plain_containers(item) for name, item in value.items()}
    if isinstance(value, MutableSequence) and not isinstance(value, list | bytearray):
        return [plain_containers(item) for item in value]
    return value


def with_attributes(values: Mapping[str, Any]) -> HyperParameters:
    """Return `values`, whose items are also attributes, as are those of the dicts in it."""
    nested = {name: with_attributes(item) if type(item) is dict else item for name, item in values.items()}
    return HyperParameters(nested)


def _is_config(value: Any) -> bool:
    """Tell a configuration object, whose items are attributes, from a dict."""
    return isinstance(value, MutableMapping) and not isinstance(value, dict) and hasattr(type(value), "__getattr__")


def _warn_of_modules(values: Mapping[str, Any]) -> None:
    for name in [name for name, value in values.items() if isinstance(value, nn.Module)]:
        received = f"{name}, a module, whose parameters the checkpoint has anyway"
        fix = f"self.save_hyperparameters(ignore={name!r})"
        warnings.warn(explain("plain values as hyperparameters", received, fix), stacklevel=3)


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
