"""The ``deepspeed`` backend: ZeRO 0 to 3, one engine per optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import DeepSpeed as DeepSpeed


def __getattr__(name: str) -> Any:
    # Lazily: a helper of this folder can be imported without the class.
    if name == "DeepSpeed":
        from .backend import DeepSpeed

        return DeepSpeed
    raise AttributeError(name)
