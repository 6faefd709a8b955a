"""`ModelSummary`: what a module consists of, and what it takes on each device."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from xtrain.callbacks.base import Callback
from xtrain.columns import columns
from xtrain.errors import ConfigurationError, explain

if TYPE_CHECKING:
    from xtrain.contract import Backend, OptimizerHandle
    from xtrain.module import LightningModule
    from xtrain.trainer import Trainer

_MEGABYTE = 10**6


class ModelSummary(Callback):
    """Writes the children of the module with their parameters to stderr when a training starts.

    The last lines say how many parameters train, and what parameters, gradients and the state of the optimizers
    take on each device, as the backend keeps them: in its precision, and sharded where it shards. Activations come
    on top. ``Trainer(enable_model_summary=False)`` leaves it out.

    Args:
        max_depth: levels of children; -1 is all of them, 0 prints the last lines only.
        **summarize_kwargs: styles of Lightning's tables, which are taken and change nothing.

    Raises:
        ConfigurationError: for a depth below -1.

    Example:
        >>> trainer = Trainer(callbacks=[ModelSummary(max_depth=2)])
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        if not isinstance(max_depth, int) or max_depth < -1:
            fix = "ModelSummary(max_depth=1)"
            raise ConfigurationError(explain("max_depth as an int of at least -1", repr(max_depth), fix))
        self._max_depth = max_depth

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Print it, now that the backend has the module."""
        if trainer.is_global_zero and sys.stderr is not None:
            text = summarize(module, trainer.backend, self._max_depth, trainer.life.optimizers)
            with suppress(OSError, ValueError):  # the terminal has gone
                print(text, file=sys.stderr, flush=True)


def summarize(
    module: nn.Module, backend: Backend, max_depth: int = 1, optimizers: Sequence[OptimizerHandle] = ()
) -> str:
    """Return the summary of `module` as text.

    Args:
        module: as `backend` has set it up.
        backend: says where the parameters are.
        max_depth: see `ModelSummary`.
        optimizers: those that train it.
    """
    rows = []
    for name, child in _children(module, max_depth):
        parameters = list(child.parameters())
        trained = [p for p in parameters if p.requires_grad]
        count, training = _count(backend, parameters), _count(backend, trained)
        mode = "train" if child.training else "eval"
        rows.append([name, type(child).__name__, f"{count:,}", f"{training:,}", mode])
    table = columns(["name", "type", "parameters", "trainable", "mode"], rows) + "\n" if rows else ""
    return table + _totals(module, backend, optimizers)


def _children(module: nn.Module, max_depth: int) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_modules():
        if name and (max_depth == -1 or name.count(".") < max_depth):
            yield name, child


def _totals(module: nn.Module, backend: Backend, optimizers: Sequence[OptimizerHandle]) -> str:
    count, trained = count_parameters(module, backend)
    lazy = sum(1 for p in module.parameters() if is_lazy(p))
    note = f", and {lazy} that the first forward will make" if lazy else ""
    memory, ranks = backend.memory(module, optimizers), backend.collectives.world_size
    parts = {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer state": memory.state,
        "master weights": memory.masters,
    }
    text = " + ".join(f"{size / _MEGABYTE:,.1f} {name}" for name, size in parts.items() if size)
    where = f"on each of {ranks} devices" if ranks > 1 else f"on {backend.device}"
    unknown = f"; not counted: the state of {', '.join(memory.unknown)}" if memory.unknown else ""
    return (
        f"{count:,} parameters ({trained:,} trainable, {count - trained:,} frozen){note}\n"
        f"{sum(parts.values()) / _MEGABYTE:,.1f} MB {where} ({backend.name}, {backend.precision.name}): {text}{unknown}"
    )


def count_parameters(module: nn.Module, backend: Backend) -> tuple[int, int]:
    """Return how many numbers the parameters of `module` have, and those that train."""
    parameters = list(module.parameters())
    return _count(backend, parameters), _count(backend, [p for p in parameters if p.requires_grad])


def _count(backend: Backend, parameters: Iterable[Tensor]) -> int:
    return sum(backend.elements_of(p) for p in parameters if not is_lazy(p))
