"""Lightning's spellings of a backend, and small checks of the Trainer's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xtrain.contract import Backend
from xtrain.errors import ConfigurationError, explain
from xtrain.launcher_auto import AUTO
from xtrain.registry import registered_backends

ACCELERATORS = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "tpu": "tpu", "xla": "tpu"}
# Strategies that only say how processes start are None: the launcher decides that.
STRATEGIES: dict[str, tuple[str | None, dict[str, Any]]] = {
    **dict.fromkeys(("auto", "single_device", "ddp", "ddp_spawn", "ddp_find_unused_parameters_true"), (None, {})),
    "single_tpu": ("tpu", {}),
    "xla": ("tpu", {}),
    "deepspeed": ("deepspeed", {}),
    **{f"deepspeed_stage_{n}": ("deepspeed", {"stage": n}) for n in (1, 2, 3)},
    **{f"deepspeed_stage_{n}_offload": ("deepspeed", {"stage": n, "offload_optimizer": "cpu"}) for n in (2, 3)},
}
DEFAULT_BACKEND = "cpu"


def read_backend(
    backend: str | Backend | None,
    accelerator: str | None,
    strategy: str | None,
    given: Mapping[str, Any] | None = None,
) -> tuple[str | Backend, dict[str, Any]]:
    """Return the backend that three spellings agree on, and its options: those given and those implied.

    Raises:
        ConfigurationError: for an unknown spelling, or two that disagree.
    """
    default = DEFAULT_BACKEND
    if backend == AUTO:
        backend, default = None, AUTO
    named: dict[str, str] = {}
    if accelerator not in (None, "auto"):
        named[f"accelerator={accelerator!r}"] = _look_up("accelerator", accelerator, ACCELERATORS)
    implied, options = (None, {}) if strategy is None else _look_up("strategy", strategy, STRATEGIES)
    if implied is not None:
        # A strategy is more specific than the accelerator it runs on.
        named = {f"strategy={strategy!r}": implied}
    options = _agreed_options(strategy, options, given or {})
    if backend is not None:
        name = backend if isinstance(backend, str) else backend.name
        places = registered_backends()  # aliases have the same place
        for spelling, other in named.items():
            if other != name and places.get(other, other) != places.get(name, name):
                raise ConfigurationError(
                    explain(f"backend and {spelling} to agree", f"backend={name!r}", f"Trainer(backend={other!r})")
                )
        return backend, options
    return next(iter(named.values()), default), options


def _agreed_options(strategy: Any, implied: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    for option, value in implied.items():
        if given.get(option, value) != value:
            expected = f"strategy={strategy!r} and backend_options to agree on {option} ({value!r})"
            fix = f"backend={STRATEGIES[strategy][0]!r} in place of strategy={strategy!r}"
            raise ConfigurationError(explain(expected, f"{option}={given[option]!r}", fix))
    return {**implied, **given}


def _look_up(flag: str, value: Any, table: dict[str, Any]) -> Any:
    if value not in table:
        raise ConfigurationError(explain(f"{flag} out of {sorted(table)}", repr(value), "Trainer(backend='cpu')"))
    return table[value]


def check_count(flag: str, value: Any, least: int) -> Any:
    """Return `value`, which is None (if that is the default) or an int of at least `least`."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= least):
        return value
    fix = f"Trainer({flag}={max(least, 1)})"
    raise ConfigurationError(explain(f"{flag} as an int of at least {least}", repr(value), fix))


def check_limit(flag: str, value: Any) -> Any:
    """Return `value`, which is None, a number of batches, or a fraction in [0, 1]."""
    if isinstance(value, float) and 0.0 <= value <= 1.0:
        return value
    if isinstance(value, float) or not (value is None or isinstance(value, int)):
        fix = f"Trainer({flag}=10) or Trainer({flag}=0.5)"
        raise ConfigurationError(explain(f"{flag} as a number of batches or a fraction in [0, 1]", repr(value), fix))
    return check_count(flag, value, 0)


def check_interval(value: Any, epochs: int | None) -> Any:
    """Return ``val_check_interval``, which is None, at least one batch, or a fraction in (0, 1]."""
    fix = "Trainer(val_check_interval=100) or Trainer(val_check_interval=0.25)"
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
