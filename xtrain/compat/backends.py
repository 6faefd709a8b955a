"""Which backend a foreign spelling means: Lightning's accelerator= and strategy=, and the wishes of launchers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from xtrain.compat.imports import in_place_of
from xtrain.compat.strategies import Accelerator, Strategy
from xtrain.contract import Backend
from xtrain.errors import ConfigurationError, UnknownBackendError, explain
from xtrain.registry import registered_backends, third_party_backends

Spellings = Mapping[str, tuple[str | None, Mapping[str, Any]]]  # the backend, and the options that are implied

ACCELERATORS: Spellings = {
    **{name: (name, {}) for name in ("cpu", "cuda", "tpu")},
    "gpu": ("cuda", {}),
    **dict.fromkeys(("hpu", "mps", "npu", "xpu"), ("accelerator", {})),
    "xla": ("tpu", {}),
}
# Strategies that only say how processes start are None: the launcher decides that.
STRATEGIES: Spellings = {
    **dict.fromkeys(("auto", "single_device", "ddp", "ddp_find_unused_parameters_true"), (None, {})),
    **dict.fromkeys(("ddp_spawn", "ddp_fork", "ddp_notebook"), (None, {})),  # which the run itself explains, if it must
    "single_tpu": ("tpu", {}),
    "xla": ("tpu", {}),
    "deepspeed": ("deepspeed", {}),
    **{f"deepspeed_stage_{n}": ("deepspeed", {"stage": n}) for n in (1, 2, 3)},
    **{f"deepspeed_stage_{n}_offload": ("deepspeed", {"stage": n, "offload_optimizer": "cpu"}) for n in (2, 3)},
    "fsdp": ("fsdp", {}),
    "fsdp_cpu_offload": ("fsdp", {"offload": "cpu"}),
}
# What people write for a backend, and what they mean by it.
MEANINGS: Mapping[str, str] = {
    **dict.fromkeys(("nvidia", "nccl", "amp", "rocm", "amd", "hip"), "Trainer(backend='cuda')"),
    **dict.fromkeys(("ddp", "dp", "multi_gpu", "multigpu"), "Trainer(backend='cuda', devices=2)"),
    **dict.fromkeys(("zero", "ds", "zero1"), "Trainer(backend='deepspeed', backend_options={'stage': 1})"),
    **{f"zero{n}": f"Trainer(backend='deepspeed', backend_options={{'stage': {n}}})" for n in (2, 3)},
    **dict.fromkeys(("fsdp2", "fully_sharded", "fsdp_native"), "Trainer(backend='fsdp')"),
    **dict.fromkeys(("torch_xla", "pjrt", "google", "colab"), "Trainer(backend='tpu')"),
    **dict.fromkeys(("gloo", "local", "none", "default"), "Trainer(backend='cpu')"),
}
AUTO = "auto"
HARDWARE, FALLBACK = ("cuda",), "cpu"  # what "auto" looks for, in this order, unless a launcher asks for something else
# Variables of launchers, and the backend each asks for if it is true; the first that is counts.
WISHES = {"ACCELERATE_USE_DEEPSPEED": "deepspeed", "ACCELERATE_USE_FSDP": "fsdp", "ACCELERATE_USE_CPU": "cpu"}
REPLICAS = "tpu"  # what torch_xla.launch and accelerate's own launcher of replicas start, and PJRT_DEVICE=TPU means


def read_backend(
    backend: str | Backend | None,
    accelerator: str | Accelerator | None,
    strategy: str | Strategy | None,
    given: Mapping[str, Any] | None = None,
) -> tuple[str | Backend, dict[str, Any]]:
    """Return the backend that three spellings agree on, and its options: those given and those implied.

    Raises:
        ConfigurationError: for an unknown spelling, or two that disagree.
    """
    backend = _meant(backend) if isinstance(backend, str) else backend
    if backend == AUTO:
        backend = None
    named: dict[str, str] = {}
    options = dict(given or {})
    # A strategy is more specific than the accelerator it runs on, so it comes last and counts alone.
    for flag, value, table in (("accelerator", accelerator, ACCELERATORS), ("strategy", strategy, STRATEGIES)):
        name, implied = (None, {}) if value in (None, AUTO) else _look_up(flag, value, table)
        if name is not None:
            named = {f"{flag}={value!r}": name}
        options = _agreed_options(f"{flag}={value!r}", name, implied, options)
    if backend is not None:
        name = backend if isinstance(backend, str) else backend.name
        places = registered_backends()  # aliases have the same place
        for spelling, other in named.items():
            if other != name and places.get(other, other) != places.get(name, name):
                raise ConfigurationError(
                    explain(f"backend and {spelling} to agree", f"backend={name!r}", f"Trainer(backend={other!r})")
                )
        return backend, options
    return next(iter(named.values()), AUTO), options


def _meant(backend: str) -> str:
    """Return `backend`, or the backend whose hardware it names (``"gpu"``).

    Raises:
        UnknownBackendError: for a name that means one but is none, with the line that says it.
    """
    name = backend.lower()
    if backend == AUTO or backend in registered_backends():
        return backend
    if name in MEANINGS:
        known = ", ".join(map(repr, registered_backends()))
        raise UnknownBackendError(explain(f"a backend out of {known}", repr(backend), MEANINGS[name]))
    return ACCELERATORS[name][0] or backend if name in ACCELERATORS else backend


def _agreed_options(
    spelling: str, backend: str | None, implied: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    for option, value in implied.items():
        if given.get(option, value) != value:
            expected = f"{spelling} and backend_options to agree on {option} ({value!r})"
            fix = f"backend={backend!r} in place of {spelling}"
            raise ConfigurationError(explain(expected, f"{option}={given[option]!r}", fix))
    return {**implied, **given}


def _look_up(flag: str, value: Any, table: Spellings) -> tuple[str | None, Mapping[str, Any]]:
    if isinstance(value, Strategy | Accelerator):
        return value.backend, value.options
    if value in table:
        return table[value]
    for cls in third_party_backends():  # imported only for a spelling that nobody else knows
        if value in cls.spellings:
            return cls.name, cls.spellings[value]
    fix = in_place_of(value) or "Trainer(backend='cpu')"
    raise ConfigurationError(explain(f"{flag} out of {sorted(table)}", f"{value!r:.80}", fix))


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
