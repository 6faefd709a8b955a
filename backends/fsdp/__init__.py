"""The ``fsdp`` backend: PyTorch's FSDP2, with gradients that are reduced once, when they are first needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import FSDP as FSDP


def __getattr__(name: str) -> Any:
    # Lazily: a helper of this folder can be imported without the class.
    if name == "FSDP":
        from .backend import FSDP

        return FSDP
    raise AttributeError(name)
