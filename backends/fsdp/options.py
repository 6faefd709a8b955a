"""Options of the backend, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from xtrain.errors import ConfigurationError, explain

_USES = {"param": "param_dtype", "reduce": "reduce_dtype", "output": "output_dtype"}
_DTYPES = {"bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float32": torch.float32, "fp32": torch.float32}


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse a `value` that is not among `choices`.

    Raises:
        ConfigurationError: with all choices.
    """
    if value not in choices:
        fix = f"FSDP({name}={choices[-1]!r})"
        raise ConfigurationError(explain(f"{name} out of {', '.join(map(repr, choices))}", repr(value), fix))


def read_mixed(mixed: Mapping[str, str | torch.dtype] | None) -> dict[str, Any]:
    """Return the arguments of FSDP2's `MixedPrecisionPolicy`.

    Raises:
        ConfigurationError: for another use, or another dtype than bf16 and fp32.
    """
    read: dict[str, Any] = {}
    for use, given in (mixed or {}).items():
        dtype = given if isinstance(given, torch.dtype) else _DTYPES.get(given)
        if use not in _USES or dtype not in _DTYPES.values():
            expected = f"mixed as a dict of {', '.join(map(repr, _USES))} to 'bfloat16' or 'float32'"
            fix = "FSDP(mixed={'param': 'bfloat16', 'reduce': 'float32'})"
            raise ConfigurationError(explain(expected, f"{use!r}: {given!r}", fix))
        read[_USES[use]] = dtype
    return read
