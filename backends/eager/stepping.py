"""Steps of torch's optimizers, without what stands around them where that would do nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as internals

Step = Callable[..., Any]


def _nothing(_: Any) -> None: ...


_RECORDED = Optimizer.profile_hook_step(_nothing).__code__
_WITHOUT_GRADIENTS = internals._use_grad_for_differentiable(_nothing).__code__


@cache
def _bare(step: Any) -> Step | None:
    """Return what torch wrapped to be `step`, without gradients; None for what others wrote or wrapped."""
    inner = getattr(step, "__wrapped__", None)
    if getattr(step, "__code__", None) is not _RECORDED or getattr(inner, "__code__", None) is not _WITHOUT_GRADIENTS:
        return None
    return torch.no_grad()(inner.__wrapped__)  # type: ignore[no-any-return, union-attr]


def step_of(optimizer: Optimizer) -> Step:
    """Return ``optimizer.step``; where nobody watches it, what does the same in three quarters of the time.

    Each step of torch enters a record for its profiler, looks for hooks and leaves messages for its compiler, which
    costs as much as the arithmetic of a small layer.
    """
    bare, own = _bare(type(optimizer).step), vars(optimizer).get("step")
    if bare is None or _is_watched(optimizer) or not (own is None or _is_of_scheduler(optimizer, own)):
        return optimizer.step
    if own is not None:
        optimizer._opt_called = True  # type: ignore[attr-defined]  # as the scheduler's wrapper does
    return MethodType(bare, optimizer)


def _is_watched(optimizer: Optimizer) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or internals._global_optimizer_pre_hooks
        or internals._global_optimizer_post_hooks
        or optimizer.defaults.get("differentiable")
        or torch._C._autograd._profiler_enabled()
    )


def _is_of_scheduler(optimizer: Optimizer, own: Any) -> bool:
    """Return whether `own` is the wrapper in which a scheduler notes that ``step`` was called."""
    return hasattr(own, "_wrapped_by_lr_sched") and own.__wrapped__ is type(optimizer).step
