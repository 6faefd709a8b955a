"""What a state is: everything a run needs to go on as if nothing had happened.

`collect` returns it in two parts. The *checkpoint* is the same for all ranks; its first keys have Lightning's names,
for the hooks that look at it or add to it. The *own* part is what differs between ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xtrain.checkpoint import named
from xtrain.checkpoint.generators import plain_generators, read_generators
from xtrain.checkpoint.parts import Part
from xtrain.checkpoint.plain import check_readable
from xtrain.contract import Phase
from xtrain.data.position import own_generators, samples_per_batch, stateful
from xtrain.data.sharding import order_is_portable, seeds_of
from xtrain.errors import CheckpointError, ProtocolError, explain
from xtrain.hparams import plain_containers
from xtrain.metrics.state import metric_state
from xtrain.run.state import Run

VERSION_KEY = "xtrain_version"


def collect(run: Run, weights_only: bool = False, background: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state of `run` as CPU tensors and plain values; all ranks call it.

    Tensors that lie on the CPU are the live ones, if nobody looks at them but who writes them now. What the ranks hold
    in shards are `xtrain.checkpoint.parts.Part`, unless a hook wants to see it.

    Args:
        run: between two training steps.
        weights_only: leave out what only a training needs.
        background: copy everything, for who writes it later.

    Returns:
        The checkpoint, complete on rank 0 only, and this rank's own part.

    Raises:
        CheckpointError: at a moment, or for objects, whose state cannot be kept.
    """
    hooks = list(savers(run, "on_save_checkpoint"))
    trained = _trained(run, bool(hooks))
    checkpoint, own = _common(run), {}
    if not weights_only:
        checkpoint |= _training(run)
        own = _own(run) | {"gradients": trained["gradients"]}
    checkpoint["state_dict"] = trained.get("state_dict", {})
    checkpoint["optimizer_states"] = {} if weights_only else trained.get("optimizer_states", {})
    take = partial(named.taken, run.backend.to_cpu, not background)
    checkpoint, own = named.copied((checkpoint, own), take)  # in one transfer
    if hooks:
        _call_hooks(hooks, checkpoint)
        checkpoint = named.copied(checkpoint, take)
    for key, state in checkpoint.get("callbacks", {}).items():
        check_readable(state, f"state_dict() of the callback {key}")
    return checkpoint, own


def _trained(run: Run, whole: bool) -> dict[str, Any]:
    handles = run.life.optimizers
    waiting = [o for o in handles if o.phase is Phase.FINALIZED]
    if waiting:
        fix = "opt.step() after self.clip_gradients(opt, ...), in the same training step"
        received = f"{waiting[0]!r} with gradients that were clipped and wait for a step"
        raise CheckpointError(explain("a save between two steps of each optimizer", received, fix))
    try:
        return run.backend.training_state(run.module, handles, whole)
    except KeyError as error:  # the engines are gone
        fix = "ModelCheckpoint(...), or self.trainer.save_checkpoint(path) in on_train_end"
        raise CheckpointError(
            explain("a save inside of the run, on this backend", f"one after it ({error})", fix)
        ) from error


def _common(run: Run) -> dict[str, Any]:
    import xtrain

    progress, module = run.trainer.progress, run.module
    return {
        "epoch": progress.epoch,
        "global_step": progress.global_step,
        VERSION_KEY: xtrain.__version__,
        "hyper_parameters": plain_containers(module.hparams),
    }


def _training(run: Run) -> dict[str, Any]:
    progress, trainer = run.trainer.progress, run.trainer
    handles = run.life.optimizers
    return {
        "lr_schedulers": [config.scheduler.state_dict() for config in run.schedulers],
        "callbacks": callback_states(trainer.callbacks),
        "optimizers": {
            label: {
                "step_count": handle.step_count,
                "skipped_steps": handle.skipped_steps,
                "steps_since_zero": handle.step_count - handle.zeroed_at,
                "phase": handle.phase.name,
            }
            for label, handle in zip(named.names_of_optimizers(handles), handles, strict=True)
        },
        "progress": {
            "batches": progress.batches + progress.ending,
            "done": progress.made,
            "window": run.window,
            "logged_steps": progress.logged_steps + int(progress.ending and not run.accumulating),
        },
        "data": _data(run),
        "loggers": [logger.state_dict() for logger in trainer.loggers],
        "trainer": {"backend": run.backend.name, "precision": trainer.precision.name, "world_size": trainer.world_size},
    } | ({} if run.datamodule is None else {"datamodule": run.datamodule.state_dict()})


def _data(run: Run) -> dict[str, Any]:
    loader = run.plan.loader
    return {
        "batches": run.trainer.progress.made,
        "samples_per_batch": samples_per_batch(loader),
        "world_size": run.trainer.world_size,
        "seeds": seeds_of(loader),
        "portable": order_is_portable(loader),
    }


def _own(run: Run) -> dict[str, Any]:
    """Return what this rank alone has."""
    loader = run.plan.loader
    source = stateful(loader)
    ahead = run.plan.remembering if run.trainer.progress.made else None  # at the end of an epoch nothing is read ahead
    state_now = None if source is None else source.state_dict()
    state: dict[str, Any] = {
        "generators": plain_generators(read_generators()),
        "epoch_generators": None if run.plan.drawn_with is None else plain_generators(run.plan.drawn_with[0]),
        "loader_generators": {} if run.plan.drawn_with is None else run.plan.drawn_with[1],
        "loader_generators_now": own_generators(loader),
        "loader": state_now if ahead is None else ahead.state,
        "ahead_generators": None if ahead is None or ahead.generators is None else plain_generators(ahead.generators),
        "backend": run.backend.state_dict(),
        "metrics": metric_state(run.metrics, run.module) if run.active else None,
    }
    if run.trainer.global_rank:  # those of rank 0 are in the module's section
        state["buffers"] = dict(run.module.named_buffers())
    return state


def callback_states(callbacks: list[Any]) -> dict[str, Any]:
    """Return the states of the callbacks that have one, by their key."""
    states = {callback.state_key: callback.state_dict() for callback in callbacks}
    return {key: state for key, state in states.items() if state}


def _call_hooks(hooks: list[tuple[str, Any]], checkpoint: dict[str, Any]) -> None:
    """Let callbacks, module and DataModule look at the checkpoint, and add to it."""
    for owner, hook in hooks:
        before = set(checkpoint)
        hook(checkpoint)
        for key in sorted(set(checkpoint) - before, key=str):
            check_readable(checkpoint[key], f"checkpoint[{key!r}], added by {owner}.on_save_checkpoint")


def savers(run: Run, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the owner's class and the hook `name`, bound to the run, of callbacks, module and DataModule."""
    from xtrain.callbacks.base import Callback
    from xtrain.data.datamodule import LightningDataModule
    from xtrain.hooks import is_overridden
    from xtrain.module import LightningModule

    for callback in run.trainer.callbacks:
        if is_overridden(name, callback, Callback):
            hook = getattr(callback, name)
            yield type(callback).__name__, lambda c, hook=hook: hook(run.trainer, run.module, c)
    for owner, base in ((run.module, LightningModule), (run.datamodule, LightningDataModule)):
        if owner is not None and is_overridden(name, owner, base):
            yield type(owner).__name__, getattr(owner, name)


def summary_of(run: Run, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a person wants to know about a checkpoint, for its manifest."""
    import xtrain

    states: Mapping[str, Any] = checkpoint["optimizer_states"]
    counts = checkpoint.get("optimizers", {})
    return {
        "epoch": checkpoint["epoch"],
        "batches": run.trainer.progress.made,
        "global_step": checkpoint["global_step"],
        "backend": run.backend.name,
        "precision": run.trainer.precision.name,
        "world_size": run.trainer.world_size,
        "optimizers": {
            label: {
                "class": state["class"],
                "steps": counts[label]["step_count"],
                "skipped": counts[label]["skipped_steps"],
            }
            for label, state in states.items()
        },
        "parameters": sum(t.numel() for t in checkpoint["state_dict"].values() if isinstance(t, Tensor | Part)),
        "versions": {"xtrain": xtrain.__version__, "torch": torch.__version__},
    }


def run_of(run: Run | None) -> Run:
    """Return `run`.

    Raises:
        ProtocolError: if there is none.
    """
    if run is None:
        fix = "trainer.fit(model); trainer.save_checkpoint('model.ckpt')"
        raise ProtocolError(explain("a Trainer that has run a module", "a new one", fix))
    return run
