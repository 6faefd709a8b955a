"""What a file may hold: tensors and plain values, which `torch.load` reads back without running code."""

from __future__ import annotations

import io
from collections import Counter, OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from xtrain.errors import CheckpointError, explain

_VALUES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_MAPPINGS = (dict, OrderedDict, Counter)
_SEQUENCES = (list, tuple, set)


def check_readable(content: Any, where: str) -> None:
    """Check that `content` can be read back with ``weights_only=True``.

    Args:
        content: what shall be written.
        where: the name of the place, for the message.

    Raises:
        CheckpointError: naming the key that holds something else.
    """
    found = _foreign(content, where)
    if found is not None:
        place, value = found
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        raise CheckpointError(
            explain("tensors and plain values, which a checkpoint can hold", f"{kind} at {place}", _fix(value))
        )


def _foreign(value: Any, where: str) -> tuple[str, Any] | None:
    """Return place and value of the first thing that cannot be read back."""
    kind = type(value)
    if kind in _VALUES or kind is Tensor or kind is nn.Parameter:
        return None
    if kind in _MAPPINGS:
        for key, item in value.items():
            found = _foreign(key, f"a key of {where}") or _foreign(item, f"{where}[{key!r:.60}]")
            if found is not None:
                return found
        return None
    if kind in _SEQUENCES:
        pairs = enumerate(value)
        return next((found for i, item in pairs if (found := _foreign(item, f"{where}[{i}]"))), None)
    return None if _survives(value) else (where, value)


def _survives(value: Any) -> bool:
    """Try it: what `torch.load` takes differs between releases, and users may extend it."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:  # whatever pickle says about it
        return False
    return True


def _fix(value: Any) -> str:
    module = type(value).__module__.partition(".")[0]
    if module == "numpy":
        return "torch.from_numpy(array) for an array, float(x) or int(x) for a number"
    return "state_dict() of it, str(path), dict(...), or leave it out: self.save_hyperparameters(ignore=['...'])"
