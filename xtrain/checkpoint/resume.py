"""Lets a run go on from a checkpoint."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xtrain.callbacks.checkpoint import ModelCheckpoint
from xtrain.checkpoint import named
from xtrain.checkpoint.finding import Loaded
from xtrain.checkpoint.generators import restore_generators
from xtrain.checkpoint.state import savers
from xtrain.checkpoint.weights import load_weights, with_masters
from xtrain.contract import Phase
from xtrain.data.position import batches_done, is_read_by_workers, restore_own_generators, stateful
from xtrain.data.sharding import set_seeds
from xtrain.errors import CheckpointError, ConfigurationError, explain
from xtrain.metrics.state import load_metric_state
from xtrain.run.state import Run

logger = logging.getLogger("xtrain")

PARTS = ("module", "optimizers", "schedulers", "callbacks", "data")
"""What can be loaded apart: weights; optimizers and loss scale; schedules; callbacks; counters, data and metrics."""

_WEIGHTS = "trainer.fit(model, ckpt_path='...', load=('module',)), which begins anew with these weights"
_IN_WORKERS = (
    "The run goes on after %d batches of an epoch: its samples are the same ones, but random numbers that are drawn in "
    "loader workers (augmentation) begin anew for the rest of this epoch. Fix:  ModelCheckpoint(every_n_epochs=1), "
    "num_workers=0, or numbers from torch.Generator().manual_seed(index) in __getitem__."
)


def check_parts(load: Any) -> tuple[str, ...] | None:
    """Return ``fit(load=...)`` as a tuple; None means everything.

    Raises:
        ConfigurationError: for a part that there is not.
    """
    if load is None:
        return None
    parts = (load,) if isinstance(load, str) else tuple(load)
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        fix = "trainer.fit(model, ckpt_path='...', load=('module', 'data'))"
        raise ConfigurationError(explain(f"load out of {PARTS}", repr(load), fix))
    return parts


class Resumption:
    """How a run goes on from a checkpoint: its parts are put back when what they belong to exists.

    Args:
        run: the run.
        loaded: the checkpoint.
        load: the parts to load; None means everything, and that everything must fit.
    """

    def __init__(self, run: Run, loaded: Loaded, load: tuple[str, ...] | None) -> None:
        self._run, self._loaded, self._load = run, loaded, load
        self.checkpoint = loaded.checkpoint
        rank, world = run.trainer.global_rank, run.trainer.world_size
        same = len(loaded.ranks) == world
        self._own: dict[str, Any] | None = loaded.ranks[rank] if same else None
        self._left_out: list[str] = []

    def _wants(self, part: str) -> bool:
        return self._load is None or part in self._load

    # ---------------------------------------------------------------- before the set-up

    def load_module(self) -> None:
        """Call the hooks, load the weights, and tell callbacks, loggers and DataModule."""
        run, checkpoint = self._run, self.checkpoint
        if run.stage == "fit" and "progress" not in checkpoint and self._load != ("module",):
            received = f"{self._loaded.path}, which was saved with weights alone"
            raise CheckpointError(explain("a checkpoint with the state of a training", received, _WEIGHTS))
        for _, hook in savers(run, "on_load_checkpoint"):
            hook(checkpoint)
        if self._wants("module"):
            weights = with_masters(run.module, checkpoint)
            self._left_out += load_weights(run.module, weights, strict=self._load is None)
        if self._wants("callbacks"):
            load_callbacks(run.trainer.callbacks, checkpoint.get("callbacks", {}))
        if run.stage != "fit" or not self._wants("data"):
            return
        progress = run.trainer.progress
        saved = checkpoint["progress"]
        progress.epoch, progress.global_step = checkpoint["epoch"], checkpoint["global_step"]
        progress.batches, progress.done, run.window = saved["batches"], saved["done"], saved["window"]
        progress.logged_steps = saved["logged_steps"]
        if run.datamodule is not None and "datamodule" in checkpoint:
            run.datamodule.load_state_dict(checkpoint["datamodule"])

    def load_loggers(self) -> None:
        """Let loggers go on in the folder of the earlier run; before they claim one of their own."""
        if self._wants("data"):
            for own, state in zip(self._run.trainer.loggers, self.checkpoint.get("loggers", ()), strict=False):
                own.load_state_dict(state)

    # ---------------------------------------------------------------- after it

    def load_optimizers(self) -> None:
        """Load optimizers, gradients, loss scale and schedules."""
        run, checkpoint = self._run, self.checkpoint
        if self._wants("optimizers"):
            self._load_optimizers()
            self._load_backend()
        if self._wants("schedulers"):
            self._load_schedulers()
        if self._wants("data"):
            set_seeds(run.plan.loader, checkpoint["data"]["seeds"])
            progress = run.trainer.progress
            if progress.done:
                position = checkpoint["data"] | {"batches": progress.done}
                progress.done = batches_done(position, run.plan.loader, run.trainer.world_size)
                self._check_order(position)
                if is_read_by_workers(run.plan.loader):
                    logger.warning(_IN_WORKERS, progress.done)
        if self._left_out:
            logger.warning("Not loaded from %s: %s.", self._loaded.path, "; ".join(self._left_out))

    def _load_optimizers(self) -> None:
        run, handles = self._run, self._run.life.optimizers
        labels = named.names_of_optimizers(handles)
        states = self.checkpoint["optimizer_states"]
        if isinstance(states, list):  # Lightning counts them
            states = self.checkpoint["optimizer_states"] = _named(states, run.module, labels, handles)
        self._compare_labels(labels, list(states))
        chosen = {label: states[label] for label in labels if label in states}
        if self._load is not None:
            chosen = {label: state for label, state in chosen.items() if self._fits(label, state)}
        facts = self.checkpoint.get("optimizers", {})
        for label, handle in zip(labels, handles, strict=True):
            if label in chosen and label in facts:
                handle.step_count, handle.skipped_steps = facts[label]["step_count"], facts[label]["skipped_steps"]
                handle.zeroed_at = handle.step_count - facts[label]["steps_since_zero"]
                handle.phase = Phase[facts[label]["phase"]]
        state = {
            "state_dict": self.checkpoint["state_dict"],
            "optimizer_states": chosen,
            "gradients": {label: held for label, held in self._gradients().items() if label in chosen},
        }
        run.backend.load_training_state(run.module, handles, state)
        for label, handle in zip(labels, handles, strict=True):
            if label in chosen and not run.backend.has_gradients(handle) and handle.phase is Phase.ACCUMULATED:
                handle.phase = Phase.STEPPED if handle.step_count else Phase.EMPTY

    def _fits(self, label: str, state: Mapping[str, Any]) -> bool:
        """Return whether a saved optimizer has the groups of ours; note it if not."""
        run = self._run
        position = named.names_of_optimizers(run.life.optimizers).index(label)
        handle = run.life.optimizers[position]
        known: dict[Tensor, str] = {parameter: name for name, parameter in run.module.named_parameters()}
        ours = {known.get(p, "") for p in handle.parameters}
        theirs = {name for group in state["groups"] for name in group["params"]}
        if type(handle.optimizer).__name__ == state["class"] and ours == theirs:
            return True
        self._left_out.append(f"optimizer {label!r} ({state['class']}), which has other parameters or another class")
        return False

    def _compare_labels(self, ours: list[str], theirs: list[str]) -> None:
        if sorted(ours) == sorted(theirs):
            return
        if self._load is None:
            fix = "trainer.fit(model, ckpt_path='...', load=('module', 'data')), which lists what it leaves out"
            raise CheckpointError(explain(f"the optimizers of the checkpoint, {sorted(theirs)}", sorted(ours), fix))
        self._left_out += [f"optimizer {label!r}" for label in theirs if label not in ours]
        self._left_out += [f"nothing for optimizer {label!r}" for label in ours if label not in theirs]

    def _gradients(self) -> dict[str, Any]:
        """Return this rank's gradients; with another number of ranks their mean, which is what a step will use."""
        if self._own is not None:
            return dict(self._own["gradients"])
        total: dict[str, dict[str, Tensor]] = {}
        for rank in self._loaded.ranks:
            for label, held in rank["gradients"].items():
                for name, gradient in held.items():
                    place = total.setdefault(label, {})
                    place[name] = place[name] + gradient if name in place else gradient
        count = len(self._loaded.ranks)
        return {label: {name: g / count for name, g in held.items()} for label, held in total.items()}

    def _load_backend(self) -> None:
        saved = self._own or (self._loaded.ranks[0] if self._loaded.ranks else None)
        if saved is None:
            return
        state = saved["backend"]
        if self._own is None or self.checkpoint["trainer"]["backend"] != self._run.backend.name:
            state = {key: value for key, value in state.items() if key == "scaler"}
        self._run.backend.load_state_dict(state)

    def _load_schedulers(self) -> None:
        ours, theirs = self._run.schedulers, self.checkpoint.get("lr_schedulers", [])
        if len(ours) != len(theirs):
            if self._load is None:
                fix = "trainer.fit(model, ckpt_path='...', load=('module', 'optimizers', 'data'))"
                raise CheckpointError(explain(f"{len(theirs)} schedulers, as in the checkpoint", len(ours), fix))
            self._left_out.append(f"{len(theirs)} schedulers; there are {len(ours)} now")
            return
        for config, state in zip(ours, theirs, strict=True):
            config.scheduler.load_state_dict(state)

    # ---------------------------------------------------------------- when training begins

    def begin_epoch(self) -> None:
        """Put back what hooks at the start may have changed: metrics, generators, schedules; skips nothing yet."""
        run = self._run
        if not self._wants("data"):
            return
        if self._wants("schedulers") and self._wants("optimizers"):
            self._reset_settings()
        if self._own is not None and self._own["metrics"] is not None:
            load_metric_state(run.metrics, run.module, [self._own["metrics"]], None)
        elif self._loaded.ranks and self._loaded.ranks[0]["metrics"] is not None:
            states = [rank["metrics"] for rank in self._loaded.ranks]
            load_metric_state(run.metrics, run.module, states, run.trainer.world_size)
        self._load_buffers()
        if not run.trainer.progress.done:
            self.load_position()
            self.ready()
        elif self._own is not None and self._own["epoch_generators"] is not None:
            restore_generators(self._own["epoch_generators"])  # the order is drawn as it was
            restore_own_generators(run.plan.loader, self._own["loader_generators"])

    def _reset_settings(self) -> None:
        """Set learning rates and schedules again, which a hook at the start of training may have moved."""
        states = self.checkpoint["optimizer_states"]
        handles = self._run.life.optimizers
        for label, handle in zip(named.names_of_optimizers(handles), handles, strict=True):
            groups = states.get(label, {}).get("groups", [])
            if len(groups) == len(handle.param_groups):
                for group, saved in zip(handle.param_groups, groups, strict=True):
                    named.load_settings(group, saved)
        self._load_schedulers()

    def _load_buffers(self) -> None:
        buffers = {} if self._own is None else self._own.get("buffers", {})
        present = dict(self._run.module.named_buffers())
        with torch.no_grad():
            for name, value in buffers.items():
                if name in present and present[name].shape == value.shape:
                    present[name].copy_(value)

    def load_position(self) -> bool:
        """Let a loader or dataset that keeps its own position go there; returns whether one did."""
        source, state = stateful(self._run.plan.loader), None if self._own is None else self._own["loader"]
        if source is None or state is None:
            return False
        source.load_state_dict(state)
        return True

    def ready(self) -> None:
        """Set the generators as they were when the checkpoint was written, or before what was read ahead then."""
        if self._own is not None:
            restore_generators(self._own.get("ahead_generators") or self._own["generators"])
            restore_own_generators(self._run.plan.loader, self._own["loader_generators_now"])
            return
        if not self._loaded.ranks:
            return
        restore_generators(self._loaded.ranks[0]["generators"], but=frozenset({"torch"}))
        trainer = self._run.trainer
        seeds = self.checkpoint["data"]["seeds"] or [0]
        torch.manual_seed((seeds[0] * 1_000_003 + trainer.global_step * 10_007 + trainer.global_rank) % 2**62)
        text = "%d processes go on where %d left off: torch's random numbers are new ones, by step and rank."
        logger.info(text, trainer.world_size, len(self._loaded.ranks))

    def read_ahead(self) -> None:
        """Set the generators again: the batch that had been read ahead when the checkpoint was written is read."""
        if self._own is not None:
            restore_generators(self._own["generators"])

    def _check_order(self, position: Mapping[str, Any]) -> None:
        if position["world_size"] == self._run.trainer.world_size or position["portable"]:
            return
        fix = f"{position['world_size']} processes, or a checkpoint of the end of an epoch"
        received = f"a sampler of its own, with {self._run.trainer.world_size} processes in the middle of an epoch"
        raise CheckpointError(explain("an order of the data that every number of processes draws alike", received, fix))


def load_callbacks(callbacks: Iterable[Any], states: Mapping[str, Any]) -> None:
    """Give each callback the state that was saved under its key, or under its class in a file of Lightning.

    Whose state nobody takes is told, but for those that save: what they know is about their own folder.
    """
    taken = set()
    for callback in callbacks:
        taken |= {callback.state_key, type(callback).__qualname__}
        state = states.get(callback.state_key, states.get(type(callback).__qualname__))
        if state is not None:
            callback.load_state_dict(state)
    saver = ModelCheckpoint.__qualname__
    lost = [key for key, state in states.items() if state and key not in taken and not key.startswith(saver)]
    if lost:
        received = f"none for the state of {', '.join(lost)}"
        fix = f"Trainer(callbacks=[{lost[0].partition('{')[0]}(...)])"
        warnings.warn(explain("the callbacks of the checkpoint", received, fix), stacklevel=2)


def _named(states: list[Any], module: nn.Module, labels: list[str], handles: Any) -> dict[str, Any]:
    """Return Lightning's numbered optimizer states by names."""
    if len(states) != len(handles):
        raise CheckpointError(explain(f"{len(states)} optimizers, as in the checkpoint", len(handles)))
    known = {parameter: name for name, parameter in module.named_parameters()}
    result = {}
    for label, handle, state in zip(labels, handles, states, strict=True):
        order = [known.get(p, f"{label}.{i}") for i, p in enumerate(handle.parameters)]
        dtypes = {name: p.dtype for name, p in zip(order, handle.parameters, strict=True)}
        groups = [
            {k: v for k, v in group.items() if k != "params"} | {"params": [order[i] for i in group["params"]]}
            for group in state["param_groups"]
        ]
        entries = {order[i]: entry for i, entry in state["state"].items()}
        kind = type(handle.optimizer).__name__
        result[label] = {
            "class": kind,
            "groups": groups,
            "state": entries,
            "dtypes": dtypes,
            "master": {},
            "outside": {},
        }
    return result
