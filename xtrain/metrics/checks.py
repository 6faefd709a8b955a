"""What may be logged under which name and with which options: checks, each with the line that is right."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from torch import Tensor

from xtrain.errors import ConfigurationError, explain


class Settings(NamedTuple):
    """How a metric is logged; the fields are options of `xtrain.metrics.logs.Logs.log`."""

    prog_bar: bool = False
    logger: bool = True
    on_step: bool | None = None
    on_epoch: bool | None = None
    reduce_fx: str | Callable[..., Any] = "mean"
    sync_dist: bool = False
    add_dataloader_idx: bool = True
    rank_zero_only: bool = False


_OPTIONS = (*Settings._fields, "batch_size", "metric_attribute")
_AXES = ("step", "epoch")  # what a row has besides its metrics


def check_name(name: Any, add_dataloader_idx: bool) -> None:
    """Raise a ConfigurationError unless `name` can stand beside the loggers' own columns."""
    if not isinstance(name, str) or not name:
        raise ConfigurationError(
            explain("a str as the name of a metric", f"{name!r} ({type(name).__name__})", "self.log('loss', loss)")
        )
    if name in _AXES:
        expected = f"another name than {' or '.join(map(repr, _AXES))}, which the loggers count themselves"
        raise ConfigurationError(explain(expected, f"self.log({name!r}, ...)", f"self.log('my_{name}', value)"))
    if add_dataloader_idx and "/dataloader_idx_" in name:
        raise ConfigurationError(
            explain(
                "a name without '/dataloader_idx_', which is added for you",
                repr(name),
                "self.log('loss', loss), or self.log(..., add_dataloader_idx=False)",
            )
        )


def check_switches(name: str, settings: Settings) -> None:
    """Raise a ConfigurationError for what Python would take for True or False, but the user may mean otherwise."""
    for switch, value in zip(Settings._fields, settings, strict=True):
        by_default = value is None and switch in ("on_step", "on_epoch")
        if switch != "reduce_fx" and not isinstance(value, bool) and not by_default:
            fix = f"self.log({name!r}, value, {switch}=True)"
            raise ConfigurationError(explain(f"True or False as {switch}", f"{switch}={value!r}", fix))


def check_value(name: str, value: Any) -> None:
    """Raise a ConfigurationError unless `value` is a real number, given as a tensor or otherwise.

    Raises:
        ConfigurationError: says which shape or type came.
    """
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex():
            return
        received = f"a {value.dtype} tensor of shape {tuple(value.shape)}"
        fix = f"self.log({name!r}, value.mean())"
    else:
        if isinstance(value, numbers.Real):
            return
        received = f"{value!r} ({type(value).__name__})"
        fix = f"self.log_dict({{...}}) for several values, self.log({name!r}, float(value)) for one"
    raise ConfigurationError(explain(f"one real number as the value of {name!r}", received, fix))


def as_number(name: str, value: Any) -> float:
    """Return `value`, given otherwise than as a tensor, as a float.

    Raises:
        ConfigurationError: if it is no real number, or one that no float can hold.
    """
    check_value(name, value)
    try:
        return float(value)
    except OverflowError as error:
        fix = f"self.log({name!r}, math.log10(value))"
        raise ConfigurationError(explain(f"a value of {name!r} that fits a float", str(error), fix)) from error


def check_weight(batch_size: Any) -> int:
    """Return `batch_size`.

    Raises:
        ConfigurationError: unless it is an int of at least 1; reading a tensor would wait for the device.
    """
    if isinstance(batch_size, int) and not isinstance(batch_size, bool) and batch_size >= 1:
        return batch_size
    received = f"batch_size={batch_size!r} ({type(batch_size).__name__})"
    raise ConfigurationError(
        explain("an int as batch_size, of at least 1", received, "self.log(..., batch_size=len(x))")
    )


def refuse_change(name: str, known: Settings, settings: Settings) -> NoReturn:
    """Raise the ConfigurationError of a metric that is logged with other settings than before."""
    pairs = zip(Settings._fields, known, settings, strict=True)
    changed = "; ".join(f"{key}={new!r} after {key}={old!r}" for key, old, new in pairs if old != new)
    expected = f"the same settings each time {name!r} is logged in this hook"
    raise ConfigurationError(explain(expected, changed, f"self.log('{name}_2', ...), a name of its own"))


def refuse_call(values: Any, unknown: Mapping[str, Any]) -> NoReturn:
    """Raise the ConfigurationError of a call with options that do not exist, or without names."""
    for option in unknown:
        closest = difflib.get_close_matches(option, _OPTIONS, n=1, cutoff=0.5)
        fix = f"self.log('loss', loss, {(closest or ['on_epoch'])[0]}=...)"
        raise ConfigurationError(explain(f"options of self.log out of {', '.join(_OPTIONS)}", option, fix))
    received = f"{values!r:.60} ({type(values).__name__})"
    raise ConfigurationError(
        explain("metrics by name", received, "self.log_dict({'loss': loss, 'accuracy': accuracy})")
    )


def refuse_twin(name: str, loader: int | None, other: int | None) -> NoReturn:
    """Raise the ConfigurationError of two evaluation loaders that log under one name."""
    expected = "a name per evaluation loader where add_dataloader_idx=False"
    fix = f"self.log(f'{name}_{{dataloader_idx}}', value, add_dataloader_idx=False)"
    raise ConfigurationError(explain(expected, f"{name!r} from loader {loader} and loader {other}", fix))
