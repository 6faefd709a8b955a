"""Checks of arguments, each with an error that says what was expected."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from xtrain.errors import ConfigurationError, explain


def check_count(flag: str, value: Any, least: int, caller: str = "Trainer") -> Any:
    """Return `value`, which is None (if that is the default) or an int of at least `least`."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= least):
        return value
    fix = f"{caller}({flag}={max(least, 1)})"
    raise ConfigurationError(explain(f"{flag} as an int of at least {least}", repr(value), fix))


def check_limit(flag: str, value: Any) -> Any:
    """Return `value`, which is None, a number of batches, or a fraction in [0, 1]."""
    if isinstance(value, float) and 0.0 <= value <= 1.0:
        return value
    if isinstance(value, float) and value > 1.0 and value.is_integer():
        return int(value)
    if isinstance(value, float) or not (value is None or isinstance(value, int)):
        fix = f"Trainer({flag}=10) or Trainer({flag}=0.5)"
        raise ConfigurationError(explain(f"{flag} as a number of batches or a fraction in [0, 1]", repr(value), fix))
    return check_count(flag, value, 0)


def check_interval(value: Any, epochs: int | None) -> Any:
    """Return ``val_check_interval``: None, at least one batch, a fraction in (0, 1], or a time."""
    fix = (
        "Trainer(val_check_interval=100), Trainer(val_check_interval=0.25) or Trainer(val_check_interval='00:00:30:00')"
    )
    if isinstance(value, str | timedelta | dict):
        return read_duration(value, fix)
    if epochs is None and not isinstance(value, int):
        raise ConfigurationError(explain("a number of batches with check_val_every_n_epoch=None", repr(value), fix))
    if value is not None and check_limit("val_check_interval", value) <= 0:
        raise ConfigurationError(explain("val_check_interval above 0", repr(value), fix))
    return value


def check_choice(flag: str, value: str | None, *choices: str) -> Any:
    """Return `value`, which is None or one of `choices`."""
    if value is None or value in choices:
        return value
    raise ConfigurationError(explain(f"{flag} out of {choices}", repr(value), f"Trainer({flag}={choices[0]!r})"))


def check_clip_value(value: Any) -> float:
    """Return `value` as a float.

    Raises:
        ConfigurationError: unless it is a finite number of at least 0, or infinity (measure only).
    """
    fix = "self.clip_gradients(opt, gradient_clip_val=1.0)"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigurationError(explain("a number as gradient_clip_val", f"{value!r} ({type(value).__name__})", fix))
    if not value > 0:  # also catches NaN
        raise ConfigurationError(explain("a gradient_clip_val above zero", value, fix))
    return float(value)


def check_switch(flag: str, value: Any, caller: str = "Trainer") -> bool:
    """Return `value`, which is True or False: any text would count as True."""
    if isinstance(value, bool):
        return value
    raise ConfigurationError(explain(f"{flag} as True or False", repr(value), f"{caller}({flag}=True)"))


def check_timeout(value: Any, caller: str) -> timedelta:
    """Return `value`, a number of seconds above 0, as a duration."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return timedelta(seconds=value)
    raise ConfigurationError(explain("timeout as seconds above 0", repr(value), f"{caller}(timeout=600.0)"))


def check_folder(flag: str, value: Any) -> Any:
    """Return `value`, which is None or the path of a folder."""
    if value is None or (isinstance(value, str | os.PathLike) and os.fspath(value)):
        return value
    raise ConfigurationError(explain(f"{flag} as the path of a folder", repr(value), f"Trainer({flag}='runs')"))


def check_options(flag: str, value: Any) -> Any:
    """Return `value`, which is None or a dict of options by name."""
    if value is None or (isinstance(value, Mapping) and all(isinstance(name, str) for name in value)):
        return value
    raise ConfigurationError(explain(f"{flag} as a dict of options by name", repr(value), f"Trainer({flag}={{...}})"))


_SCALER_OPTIONS: dict[str, tuple[float, str, Callable[[float], bool]]] = {
    "init_scale": (2.0**16, "finite and above 0", lambda value: 0.0 < value < math.inf),
    "growth_factor": (2.0, "above 1", lambda value: 1.0 < value < math.inf),
    "backoff_factor": (0.5, "between 0 and 1", lambda value: 0.0 < value < 1.0),
    "growth_interval": (2000, "as an int of at least 1", lambda value: isinstance(value, int) and value >= 1),
}


def check_scaler_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `xtrain.scaler.LossScaler`, with the defaults of those that are not among `options`.

    Raises:
        ConfigurationError: for an unknown option or a value that means nothing.
    """
    values = {name: default for name, (default, _, _) in _SCALER_OPTIONS.items()} | dict(options)
    unknown = sorted(options.keys() - _SCALER_OPTIONS.keys())
    if unknown:
        raise _wrong_scaler_options(f"scaler_kwargs out of {', '.join(_SCALER_OPTIONS)}", ", ".join(unknown))
    for name, (_, expected, holds) in _SCALER_OPTIONS.items():
        if isinstance(values[name], bool) or not isinstance(values[name], int | float) or not holds(values[name]):
            raise _wrong_scaler_options(f"{name} {expected}", f"{name}={values[name]!r}")
    return values


def _wrong_scaler_options(expected: str, received: str) -> ConfigurationError:
    fix = "Trainer(scaler_kwargs={'init_scale': 2.0**16, 'growth_interval': 2000})"
    return ConfigurationError(explain(expected, received, fix))


def read_duration(
    value: Any, fix: str = "Trainer(max_time='00:12:00:00') or Trainer(max_time={'hours': 12})"
) -> timedelta:
    """Return a duration given as ``"DD:HH:MM:SS"``, as a `timedelta`, or as a dict of its arguments.

    Args:
        value: the duration.
        fix: what to write instead of a wrong one.

    Raises:
        ConfigurationError: for anything else, or no time at all.
    """
    duration = None
    if isinstance(value, timedelta):
        duration = value
    elif isinstance(value, str) and re.fullmatch(r"\d+(:\d\d?){3}", value.strip()):
        days, hours, minutes, seconds = map(int, value.split(":"))
        duration = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    elif isinstance(value, dict) and value.keys() <= {"weeks", "days", "hours", "minutes", "seconds"}:
        duration = timedelta(**value)
    if duration is None or duration <= timedelta(0):
        raise ConfigurationError(explain("a time as 'DD:HH:MM:SS', a timedelta or a dict", repr(value), fix))
    return duration
