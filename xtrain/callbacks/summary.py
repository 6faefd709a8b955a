"""`ModelSummary`: what a module consists of, and what it takes on each device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from xtrain.callbacks.base import Callback
from xtrain.columns import columns
from xtrain.errors import ConfigurationError, explain

if TYPE_CHECKING:
    from xtrain.contract import Backend
    from xtrain.module import LightningModule
    from xtrain.trainer import Trainer

_MEGABYTE = 10**6


class ModelSummary(Callback):
    """Prints the children of the module with their parameters when a training starts.

    The last lines say how many parameters train and what they take on each device, as the backend
    keeps them: in its precision, and sharded where it shards.

    Args:
        max_depth: levels of children; -1 is all of them, 0 prints the last lines only.

    Raises:
        ConfigurationError: for a depth below -1.

    Example:
        >>> trainer = Trainer(callbacks=[ModelSummary(max_depth=2)])
    """

    def __init__(self, max_depth: int = 1) -> None:
        if not isinstance(max_depth, int) or max_depth < -1:
            fix = "ModelSummary(max_depth=1)"
            raise ConfigurationError(explain("max_depth as an int of at least -1", repr(max_depth), fix))
        self._max_depth = max_depth

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Print it, now that the backend has the module."""
        if trainer.is_global_zero:
            trainer.print(summarize(module, trainer.backend, self._max_depth))


def summarize(module: nn.Module, backend: Backend, max_depth: int = 1) -> str:
    """Return the summary of `module` as text.

    Args:
        module: as `backend` has set it up.
        backend: says where the parameters are.
        max_depth: see `ModelSummary`.
    """
    rows = []
    for name, child in _children(module, max_depth):
        parameters = list(child.parameters())
        trained = [p for p in parameters if p.requires_grad]
        count, training = _count(backend, parameters), _count(backend, trained)
        mode = "train" if child.training else "eval"
        rows.append([name, type(child).__name__, f"{count:,}", f"{training:,}", mode])
    table = columns(["name", "type", "parameters", "trainable", "mode"], rows) + "\n" if rows else ""
    return table + _totals(module, backend)


def _children(module: nn.Module, max_depth: int) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_modules():
        if name and (max_depth == -1 or name.count(".") < max_depth):
            yield name, child


def _totals(module: nn.Module, backend: Backend) -> str:
    parameters = list(module.parameters())
    count, trained = _count(backend, parameters), _count(backend, [p for p in parameters if p.requires_grad])
    parts = [backend.local_part(p) for p in parameters if not is_lazy(p)]
    megabytes = sum(part.numel() * part.element_size() for part in parts) / _MEGABYTE
    ranks = backend.collectives.world_size
    where = f"on each of {ranks} devices" if ranks > 1 else f"on {backend.device}"
    lazy = sum(1 for p in parameters if is_lazy(p))
    note = f", and {lazy} that the first forward will make" if lazy else ""
    return (
        f"{count:,} parameters ({trained:,} trainable, {count - trained:,} frozen){note}; "
        f"{megabytes:,.1f} MB {where} ({backend.name}, {backend.precision.name})"
    )


def _count(backend: Backend, parameters: Iterable[Tensor]) -> int:
    return sum(backend.elements_of(p) for p in parameters if not is_lazy(p))
