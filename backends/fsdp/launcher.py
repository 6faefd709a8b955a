"""What ``accelerate launch --use_fsdp`` asks for, read from the environment it sets (version 2 of its settings)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from xtrain.errors import ConfigurationError, explain

_TRUE = ("1", "true", "yes", "y", "on", "t")

# Settings that would change what is trained or kept, and what to write instead.
_REFUSED = {
    "FSDP_ACTIVATION_CHECKPOINTING": "torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) in the forward",
    "FSDP_IGNORED_MODULES": "FSDP(shard=lambda name, module: ...) for what is sharded",
}

_PARALLEL = "PARALLELISM_CONFIG_"


def agreed_options(given: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Return options of the backend on which script and launcher agree.

    Args:
        given: by the script; None where it says nothing.
        environ: variables of this process.

    Raises:
        ConfigurationError: for settings that contradict the script, or that xtrain does not follow.
    """
    if not _true(environ, "ACCELERATE_USE_FSDP"):
        return dict(given)
    for variable, instead in _REFUSED.items():
        value = environ.get(variable, "")
        if value.strip().lower() not in ("", "false", "none", "0"):
            raise ConfigurationError(explain(f"no {variable}", f"{variable}={value}", instead))
    _check_axes(environ)
    wanted: dict[str, tuple[Any, str]] = {}
    if _true(environ, "FSDP_OFFLOAD_PARAMS"):
        wanted["offload"] = ("cpu", "FSDP_OFFLOAD_PARAMS=true")
    if _true(environ, "ACCELERATE_USE_CPU"):
        wanted["device"] = ("cpu", f"ACCELERATE_USE_CPU={environ['ACCELERATE_USE_CPU']}")
    wrapped = environ.get("FSDP_AUTO_WRAP_POLICY", "").upper()
    if wrapped:
        wanted["shard"] = (_policy(wrapped, environ), f"FSDP_AUTO_WRAP_POLICY={wrapped}")
    copies = _parallel_size(environ, "DP_REPLICATE")
    if copies > 1:
        wanted["replicate"] = (copies, f"{_PARALLEL}DP_REPLICATE_SIZE={copies}")
    options = dict(given)
    for name, (value, source) in wanted.items():
        if options[name] not in (None, value):
            received = f"{name}={options[name]!r}, but {source} asks for another one"
            fix = f"leave {name} out, or change accelerate's configuration"
            raise ConfigurationError(explain(f"script and launcher to agree on {name}", received, fix))
        options[name] = value
    return options


def _check_axes(environ: Mapping[str, str]) -> None:
    """Refuse layers that stay gathered, and what is split along other axes than the batch."""
    if environ.get("FSDP_RESHARD_AFTER_FORWARD", "").strip().lower() in ("false", "0", "no"):
        received = "FSDP_RESHARD_AFTER_FORWARD=false: what stays gathered would miss toggles"
        fix = "fsdp_reshard_after_forward: true"
        raise ConfigurationError(explain("layers that are freed after forward", received, fix))
    for axis in ("TP", "CP", "SP"):
        if _parallel_size(environ, axis) > 1:
            received = f"{_PARALLEL}{axis}_SIZE={_parallel_size(environ, axis)}"
            raise ConfigurationError(explain("a mesh of data and fsdp", received, "FSDP(mesh={'data': 2, 'fsdp': 4})"))


def _parallel_size(environ: Mapping[str, str], axis: str) -> int:
    asked = _true(environ, "ACCELERATE_USE_PARALLELISM_CONFIG")
    return int(environ.get(f"{_PARALLEL}{axis}_SIZE", "") or 1) if asked else 1


def _true(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").strip().lower() in _TRUE


def _policy(wrapped: str, environ: Mapping[str, str]) -> Any:
    if wrapped == "TRANSFORMER_BASED_WRAP":
        names = [name.strip() for name in environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",") if name.strip()]
        return IsNamed(tuple(names)) if names else "layers"
    if wrapped == "SIZE_BASED_WRAP":
        return IsLarge(int(environ.get("FSDP_MIN_NUM_PARAMS", "") or 0))
    return "children"


class IsNamed:
    """A policy that makes a group of each module of some classes.

    Args:
        names: of the classes.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def __call__(self, name: str, module: nn.Module) -> bool:
        """Return whether `module` is of such a class."""
        return type(module).__name__ in self.names


class IsLarge:
    """A policy that makes a group of each module with many parameters in it.

    Args:
        numbers: how many numbers they have at least.
    """

    def __init__(self, numbers: int) -> None:
        self.numbers = numbers

    def __call__(self, name: str, module: nn.Module) -> bool:
        """Return whether `module` is so large."""
        return sum(p.numel() for p in module.parameters()) >= max(1, self.numbers)
