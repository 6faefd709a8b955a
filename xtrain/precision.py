"""Precision policies: in which dtype a module's parameters live and in which its forward runs.

A policy holds no state; the loss scale of ``16-mixed`` is in `xtrain.scaler`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from xtrain.errors import ConfigurationError, explain

_NO_CONTEXT = nullcontext()  # holds nothing, so one serves all


@dataclass(frozen=True, eq=False, repr=False)
class Precision(str):
    """How numbers are represented during training; also the str that is its name.

    Attributes:
        name: the spelling used in `Trainer(precision=...)`.
        parameter_dtype: dtype of floating-point parameters, buffers and inputs; None leaves them.
        autocast_dtype: dtype of the forward's matrix products under autocast; None means no autocast.
        loss_scaling: whether gradients would underflow without a scaled loss (fp16 autocast).
    """

    name: str
    parameter_dtype: torch.dtype | None = None
    autocast_dtype: torch.dtype | None = None
    loss_scaling: bool = False

    def __new__(cls, name: str, *_: Any, **__: Any) -> Precision:
        """Make the str."""
        return super().__new__(cls, name)

    def forward_context(self, device_type: str) -> AbstractContextManager[Any]:
        """Return the context of a forward pass on `device_type`.

        Under a mixed policy that is autocast. Its weight cache stays off: a cast made under
        `torch.no_grad` would be reused by a later forward that needs gradients, and that network
        would silently get none (pytorch/pytorch#65766); casts made before an optimizer step would be
        stale after it. Under a true policy, tensors made without a dtype get the policy's.
        """
        if self.parameter_dtype is not None:
            return default_dtype(self.parameter_dtype)
        if self.autocast_dtype is None:
            return _NO_CONTEXT
        return torch.autocast(device_type, dtype=self.autocast_dtype, cache_enabled=False)

    def suspended(self, device_type: str) -> AbstractContextManager[Any]:
        """Return the context of an optimizer step: what `forward_context` set is off."""
        if self.parameter_dtype is not None:
            return default_dtype(torch.float32)
        return self.backward_context(device_type)

    def backward_context(self, device_type: str) -> AbstractContextManager[Any]:
        """Return the context of a backward pass: without autocast, but with the forward's default dtype.

        Activation checkpointing runs a forward again there; it restores autocast by itself.
        """
        if self.autocast_dtype is None:
            return _NO_CONTEXT
        return torch.autocast(device_type, enabled=False)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make `dtype` torch's default inside the context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


PRECISIONS: dict[str, Precision] = {
    policy.name: policy
    for policy in (
        Precision("32-true"),
        Precision("16-mixed", autocast_dtype=torch.float16, loss_scaling=True),
        Precision("bf16-mixed", autocast_dtype=torch.bfloat16),
        Precision("bf16-true", parameter_dtype=torch.bfloat16),
        Precision("16-true", parameter_dtype=torch.float16),
    )
}

_ALIASES = {
    "None": "32-true",
    "32": "32-true",
    "fp32": "32-true",
    "16": "16-mixed",
    "fp16": "16-mixed",
    "bf16": "bf16-mixed",
}


def resolve_precision(spelling: str | int | None) -> Precision:
    """Return the policy for `spelling`; Lightning's ``32``, ``16``, ``"bf16"`` and None are understood.

    Raises:
        ConfigurationError: for any other spelling.
    """
    name = _ALIASES.get(str(spelling), str(spelling))
    if name not in PRECISIONS:
        known = ", ".join(map(repr, PRECISIONS))
        raise ConfigurationError(explain(f"a precision out of {known}", repr(spelling), "Trainer(precision='32-true')"))
    return PRECISIONS[name]
