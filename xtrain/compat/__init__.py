"""Spellings of other libraries: Lightning's names of a backend."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from xtrain.contract import Backend
from xtrain.errors import ConfigurationError, explain
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
AUTO = "auto"


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


def replica_rank() -> int | None:
    """Return the rank that ``torch_xla.launch`` gave this thread or process; None where it started one only.

    Nothing is imported or started: before that launcher has started its runtime there are no ranks.
    """
    torch_xla = sys.modules.get("torch_xla")
    if torch_xla is None or not torch_xla._XLAC._xla_runtime_is_initialized():
        return None
    xr = sys.modules["torch_xla.runtime"]
    if torch_xla._XLAC._xla_get_replication_devices_count():
        return int(xr.global_ordinal())
    return int(xr.process_index()) if xr.process_count() > 1 else None
