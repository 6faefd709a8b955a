"""Parameters in shards that are used outside of their network's forward: said in the user's words."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from torch import nn

from xtrain.errors import ConfigurationError, explain

_SIGNS = ("mixed torch.Tensor and DTensor", "mixed torch.Tensor and distributed tensor")


class ExplainsShards(AbstractContextManager[Any]):
    """The context of a forward pass, in which torch's error about a shard becomes one that says what to do.

    Args:
        inner: the context of the precision.
        names: modules of the run by name, the user's own as ``""``.
    """

    def __init__(self, inner: AbstractContextManager[Any], names: Mapping[nn.Module, str]) -> None:
        self._inner, self._names = inner, names

    def __enter__(self) -> Any:
        return self._inner.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        ended = self._inner.__exit__(kind, error, traceback)
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS):
            raise self._explained(traceback) from error
        return ended

    def _explained(self, traceback: TracebackType | None) -> ConfigurationError:
        place, method = "", "training_step"
        while traceback is not None:
            owner = traceback.tb_frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and owner in self._names and not _is_call(traceback):
                place, method = self._names[owner], traceback.tb_frame.f_code.co_name
            traceback = traceback.tb_next
        if place:
            fix = f"FSDP(methods=['{place}.{method}']), which gathers its parameters for that call"
            received = f"a use of shards in {place}.{method}, which FSDP2 knows nothing of"
        else:
            fix = "self.net(x), or FSDP(shard=...), or a parameter on the LightningModule itself, which stays whole"
            received = f"a network's parameter, used directly in {method}"
        return ConfigurationError(explain("parameters to be used in the forward of their network", received, fix))


def _is_call(traceback: TracebackType) -> bool:
    """Return whether the frame is torch's own, around a forward."""
    return traceback.tb_frame.f_code.co_name in ("_call_impl", "_wrapped_call_impl", "inner", "wrapped_method")
