"""Type aliases for annotations of modules, named as in Lightning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypedDict

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from xtrain.configure import LRSchedulerConfig as LRSchedulerConfig

STEP_OUTPUT: TypeAlias = Tensor | Mapping[str, Any] | None
"""What a step may return."""

TRAIN_DATALOADERS: TypeAlias = Any
"""What ``train_dataloader`` may return: an iterable of batches, or dicts and lists of them."""

EVAL_DATALOADERS: TypeAlias = Any
"""What the loaders of an evaluation may be: an iterable of batches, or several."""

LRSchedulerTypeTuple = (LRScheduler, ReduceLROnPlateau)
LRSchedulerTypeUnion: TypeAlias = LRScheduler | ReduceLROnPlateau
LRSchedulerPLType: TypeAlias = LRScheduler | ReduceLROnPlateau
LRSchedulerType: TypeAlias = type[LRScheduler] | type[ReduceLROnPlateau]


class LRSchedulerConfigType(TypedDict, total=False):
    """A scheduler and when it is stepped, as `configure_optimizers` may return it."""

    scheduler: Any
    name: str | None
    interval: str
    frequency: int
    reduce_on_plateau: bool
    monitor: str | None
    strict: bool


class OptimizerConfig(TypedDict):
    """An optimizer alone, as `configure_optimizers` may return it."""

    optimizer: Optimizer


class OptimizerLRSchedulerConfig(TypedDict):
    """An optimizer with its scheduler, as `configure_optimizers` may return it."""

    optimizer: Optimizer
    lr_scheduler: LRSchedulerTypeUnion | LRSchedulerConfigType


OptimizerLRScheduler: TypeAlias = (
    Optimizer
    | Sequence[Optimizer]
    | tuple[Sequence[Optimizer], Sequence[LRSchedulerTypeUnion | LRSchedulerConfigType]]
    | OptimizerConfig
    | OptimizerLRSchedulerConfig
    | Sequence[OptimizerConfig]
    | Sequence[OptimizerLRSchedulerConfig]
    | None
)
"""What `configure_optimizers` may return."""
