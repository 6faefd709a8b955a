"""Validation, testing and prediction: a forward over some loaders, without gradients."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from xtrain.data.batches import empty_loader, limited, nothing_left, size_of, with_last
from xtrain.data.sharding import set_epoch
from xtrain.errors import ConfigurationError, explain
from xtrain.run.agreement import meet
from xtrain.run.state import Run

# By stage: the name in hooks and steps, and the Trainer's limit.
_NAMES = {"validate": "validation", "test": "test", "predict": "predict"}
_LIMITS = {"validate": "limit_val_batches", "test": "limit_test_batches", "predict": "limit_predict_batches"}


def evaluate(run: Run, stage: str, loaders: list[Any]) -> list[Any]:
    """Run ``validation_step``, ``test_step`` or ``predict_step`` over `loaders`.

    Args:
        run: its metrics collect what the steps log.
        stage: ``"validate"``, ``"test"`` or ``"predict"``, or ``"sanity"``, a short validation before training
            whose metrics are dropped.
        loaders: one or several iterables of batches.

    Returns:
        The steps' outputs for prediction (one list per loader if there are several), else the
        metrics of the epoch as a list with one dict per loader.
    """
    kind = "validate" if stage == "sanity" else stage
    name, several = _NAMES[kind], len(loaders) > 1
    limit = run.plan.sanity_batches if stage == "sanity" else getattr(run.trainer, _LIMITS[kind])
    step = accept_arguments(getattr(run.module, f"{name}_step"), 3 if several else 2)
    if stage == "validate" and run.called == "fit" and not run.accumulating:
        run.call("on_validation_model_zero_grad")
    metric_stage: Any = stage if stage != "predict" else "idle"
    for loader in loaders:
        set_epoch(loader, run.trainer.current_epoch)
    meet(run, f"begin {name}")
    with run.metrics.stage(metric_stage), _stage(run, stage), _in_eval_mode(run, name):
        run.call(f"on_{name}_start")
        run.call(f"on_{name}_epoch_start")
        outputs = [_over_loader(run, kind, step, loader, i, several, limit) for i, loader in enumerate(loaders)]
        if stage == "predict":
            run.predictions = outputs if several else outputs[0]
            run.call("on_predict_epoch_end")
            run.call("on_predict_end")
            meet(run, f"end {name}")
            return run.predictions  # type: ignore[no-any-return]
        run.metrics.reduce_epoch()
        run.call(f"on_{name}_epoch_end")
        run.metrics.send_epoch(run.log_step, run.trainer.current_epoch)
        results = run.metrics.by_loader
        run.call(f"on_{name}_end")
    meet(run, f"end {name}")
    return _per_loader(results, len(loaders))


def _over_loader(
    run: Run, stage: str, step: Any, loader: Any, index: int, several: bool, limit: int | float | None
) -> list[Any]:
    name, size = _NAMES[stage], size_of(loader)
    count = limited(size, limit, _LIMITS[stage])
    if size and count == 0 and limit != 0:
        raise nothing_left(_LIMITS[stage], limit, size)
    outputs: list[Any] = []
    which = (index,) if several else ()
    batch_idx = -1
    for batch_idx, (batch, _) in enumerate(with_last(loader, count, size is not None)):
        run.evaluated = batch_idx
        batch = run.transfer(batch, index)
        run.metrics.set_batch(batch, index if several else None)
        run.call(f"on_{name}_batch_start", batch, batch_idx, index)
        run.metrics.hook(f"{name}_step")
        with run.backend.forward_context():
            output = step(batch, batch_idx, *which)
        run.backend.step_boundary()
        run.call(f"on_{name}_batch_end", output, batch, batch_idx, index)
        run.metrics.flush_step(run.log_step, run.trainer.current_epoch)
        if stage == "predict" and run.keeps_predictions:
            outputs.append(output)
    run.evaluated = None
    if not any(map(any, run.backend.collectives.meet("end a loader", bytes([batch_idx >= 0])))) and limit != 0:
        raise empty_loader(name)
    return outputs


def _per_loader(results: list[tuple[int | None, str, float]], count: int) -> list[dict[str, float]]:
    """Return what each loader logged; what was logged at the end of the epoch belongs to all of them."""
    return [{name: value for loader, name, value in results if loader in (None, index)} for index in range(count)]


@contextmanager
def _stage(run: Run, stage: str) -> Iterator[None]:
    outer, run.stage = run.stage, stage
    try:
        yield
    finally:
        run.stage = outer


@contextmanager
def _in_eval_mode(run: Run, name: str) -> Iterator[None]:
    """Put every submodule in eval mode, and afterwards each one back as it was; the module may do both itself."""
    modes = [(m, m.training) for m in run.module.modules()]
    if not run.hooks[f"on_{name}_model_eval"]:
        run.module.eval()
    # The sanity check may be the first forward: what a module makes there once is used in training.
    faster = run.trainer.inference_mode and run.backend.capabilities.inference_mode and run.stage != "sanity"
    no_gradients = torch.inference_mode() if faster else torch.no_grad()
    try:
        with no_gradients:
            run.call(f"on_{name}_model_eval")
            yield
    finally:
        if run.hooks.get(f"on_{name}_model_train"):
            run.call(f"on_{name}_model_train")
        else:
            for submodule, mode in modes:
                submodule.training = mode


def accept_arguments(step: Any, count: int) -> Any:
    """Return `step` callable with `count` positional arguments, though it may declare fewer.

    Raises:
        ConfigurationError: if it declares more, or takes keywords only.
    """
    code = getattr(getattr(step, "__func__", step), "__code__", None)
    if code is None or code.co_flags & 0x04:  # not a plain function, or it takes *args
        return step
    declared = code.co_argcount - (1 if hasattr(step, "__self__") else 0)
    try:
        inspect.signature(step).bind(*range(min(declared, count)))
    except TypeError as error:
        received = f"{step.__name__}{inspect.signature(step)}"
        line = f"def {step.__name__}(self, batch, batch_idx): ..."
        expected = f"{step.__name__} with at most {count} arguments, by position"
        raise ConfigurationError(explain(expected, received, line)) from error
    if declared >= count:
        return step
    return lambda *arguments: step(*arguments[:declared])
