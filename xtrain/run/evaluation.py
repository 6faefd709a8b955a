"""Validation, testing and prediction: a forward over some loaders, without gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from xtrain.data.loaders import empty_loader, limited, nothing_left, size_of, with_last
from xtrain.module import LightningModule

if TYPE_CHECKING:
    from xtrain.trainer import Trainer

HOOK_NAMES = {"validate": "validation", "test": "test", "predict": "predict"}


def evaluate(
    trainer: Trainer, stage: str, loaders: list[Any], limit: int | float | None, sanity: bool = False
) -> list[Any]:
    """Run ``validation_step``, ``test_step`` or ``predict_step`` over `loaders`.

    Args:
        trainer: the run; its metrics collect what the steps log.
        stage: ``"validate"``, ``"test"`` or ``"predict"``.
        loaders: one or several iterables of batches.
        limit: batches per loader, see `xtrain.data.loaders.limited`.
        sanity: a check before training, whose metrics are dropped.

    Returns:
        The steps' outputs for prediction (one list per loader if there are several), else the
        metrics of the epoch as a list with one dict per loader.
    """
    name = HOOK_NAMES[stage]
    module = trainer.lightning_module
    step = accept_arguments(getattr(module, f"{name}_step"), 3 if len(loaders) > 1 else 2)
    outputs: list[list[Any]] = []
    metric_stage: Any = "sanity" if sanity else stage if stage != "predict" else "idle"
    with (
        trainer.metrics.stage(metric_stage),
        _in_eval_mode(trainer, module),
        _stage(trainer, "sanity" if sanity else stage),
    ):
        trainer.call(f"on_{name}_start")
        trainer.call(f"on_{name}_epoch_start")
        for index, loader in enumerate(loaders):
            outputs.append(_over_loader(trainer, name, step, loader, index, len(loaders) > 1, limit))
        if stage == "predict":
            trainer.call("on_predict_epoch_end")
            trainer.call("on_predict_end")
            return outputs if len(outputs) > 1 else outputs[0]
        trainer.metrics.reduce_epoch()
        trainer.call(f"on_{name}_epoch_end")
        results = trainer.metrics.send_epoch(trainer.global_step, trainer.current_epoch)
        trainer.call(f"on_{name}_end")
    return _per_loader(results, len(loaders))


def _over_loader(
    trainer: Trainer, name: str, step: Any, loader: Any, index: int, several: bool, limit: int | float | None
) -> list[Any]:
    size = size_of(loader)
    flag = f"limit_{'val' if name == 'validation' else name}_batches"
    count = limited(size, limit, flag)
    if size and count == 0 and limit != 0:
        raise nothing_left(flag, limit, size)
    outputs: list[Any] = []
    place = (index,) if several else ()
    batch_idx = -1
    for batch_idx, (batch, _) in enumerate(with_last(loader, count, size is not None)):
        batch = trainer.transfer(batch, index)
        trainer.metrics.set_batch(batch, index if several else None)
        trainer.call(f"on_{name}_batch_start", batch, batch_idx, index)
        trainer.metrics.hook(f"{name}_step")
        with trainer.backend.forward_context():
            output = step(batch, batch_idx, *place)
        trainer.backend.step_boundary()
        trainer.call(f"on_{name}_batch_end", output, batch, batch_idx, index)
        trainer.metrics.flush_step(trainer.global_step, trainer.current_epoch)
        if name == "predict":
            outputs.append(output)
    if batch_idx < 0 and limit != 0:
        raise empty_loader(name)
    return outputs


def _per_loader(results: dict[str, float], count: int) -> list[dict[str, float]]:
    """Split epoch metrics by the suffix that several loaders give them."""
    if count == 1:
        return [results]
    suffixes = [f"/dataloader_idx_{i}" for i in range(count)]
    return [
        {k: v for k, v in results.items() if k.endswith(suffix) or not k.endswith(tuple(suffixes))}
        for suffix in suffixes
    ]


@contextmanager
def _stage(trainer: Trainer, stage: str) -> Iterator[None]:
    outer, trainer.stage = trainer.stage, stage
    try:
        yield
    finally:
        trainer.stage = outer


@contextmanager
def _in_eval_mode(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Put every submodule in eval mode, and afterwards each one back as it was."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    faster = trainer.inference_mode and trainer.backend.capabilities.inference_mode
    no_gradients = torch.inference_mode() if faster else torch.no_grad()
    try:
        with no_gradients:
            yield
    finally:
        for submodule, mode in modes:
            submodule.training = mode


def accept_arguments(step: Any, count: int) -> Any:
    """Return `step` callable with `count` positional arguments, though it may declare fewer."""
    code = getattr(getattr(step, "__func__", step), "__code__", None)
    if code is None or code.co_flags & 0x04:  # not a plain function, or it takes *args
        return step
    declared = code.co_argcount - (1 if hasattr(step, "__self__") else 0)
    if declared >= count:
        return step
    return lambda *arguments: step(*arguments[:declared])
