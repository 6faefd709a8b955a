"""The ``tpu`` backend, also called ``xla``: PyTorch/XLA, one graph per training step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import XLA as XLA


def __getattr__(name: str) -> Any:
    # Lazily: a helper of this folder can be imported without the class.
    if name == "XLA":
        from .backend import XLA

        return XLA
    raise AttributeError(name)
