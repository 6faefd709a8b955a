"""What is looked at before a run begins, and while it goes on: modules, hooks and steps that would train nothing."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from torch import nn
from torch.optim import Optimizer

from xtrain.callbacks.base import Callback
from xtrain.compat.imports import in_place_of
from xtrain.data.datamodule import LightningDataModule
from xtrain.errors import ConfigurationError, ProtocolError, explain
from xtrain.hooks import BatchHooks, ModuleHooks, is_overridden
from xtrain.module import LightningModule
from xtrain.run.state import Run, TrainerState

IDLE_BATCHES = 1000
"""After so many batches without a step it is said, if an epoch is longer."""

# Hooks of older versions of Lightning, and where their code belongs now.
_OLDER = {
    **{f"{name}_epoch_end": f"on_{hook}_epoch_end" for name, hook in
       (("training", "train"), ("validation", "validation"), ("test", "test"))},
    **{f"{name}_step_end": f"{name}_step" for name in ("training", "validation", "test")},
    "on_epoch_start": "on_train_epoch_start", "on_epoch_end": "on_train_epoch_end",
    "on_batch_start": "on_train_batch_start", "on_batch_end": "on_train_batch_end",
    "on_pretrain_routine_start": "on_fit_start", "on_pretrain_routine_end": "on_fit_start",
    "on_init_start": "setup", "on_init_end": "setup", "on_keyboard_interrupt": "on_exception",
    "configure_sharded_model": "configure_model", "on_configure_sharded_model": "setup",
    "on_hpc_load": "on_load_checkpoint", "on_hpc_save": "on_save_checkpoint",
    **{f"on_{name}_dataloader": f"{name}_dataloader" for name in ("train", "val", "test", "predict")},
    "get_progress_bar_dict": "log", "tbptt_split_batch": "training_step",
}  # fmt: skip


def check_idle(trainer: TrainerState, module: Any) -> None:
    """Check that neither `trainer` nor `module` is in a run.

    Raises:
        ConfigurationError: if `module` is no LightningModule, or one that was not initialised.
        ProtocolError: if one of them is in a run.
    """
    if not isinstance(module, LightningModule):
        fix = in_place_of(module) or "class Model(xtrain.LightningModule): ..."
        raise ConfigurationError(explain("a LightningModule", f"{type(module).__name__}", fix))
    if "_modules" not in vars(module):
        fix = "def __init__(self): super().__init__(); ..."
        raise ConfigurationError(explain(f"{type(module).__name__} to call super().__init__()", "it did not", fix))
    if trainer.run is not None and trainer.run.active:
        fix = "Trainer(max_epochs=1).validate(other_module, loader), another Trainer with another module"
        raise ProtocolError(explain("one run of a Trainer at a time", f"another, inside its {trainer.stage}", fix))
    other = module._trainer
    if other is not None and other.run is not None and other.run.active and module._life is not None:
        fix = "copy.deepcopy(module) for the second Trainer"
        raise ProtocolError(explain("a module in one run at a time", f"one that is in a {other.stage}", fix))


def check_datamodule(loaders: Mapping[str, Any], datamodule: Any) -> None:
    """Check what ``datamodule=`` is, and that no loader stands beside its own.

    Args:
        loaders: those given, by the name of the method that would make them.
        datamodule: what was given.

    Raises:
        ConfigurationError: if it is no LightningDataModule, or a loader of it would be ignored.
    """
    if datamodule is None:
        return
    fix = "trainer.fit(model, datamodule=MyData())"
    if not isinstance(datamodule, LightningDataModule):
        line = in_place_of(datamodule) or fix
        raise ConfigurationError(explain("a LightningDataModule", f"{datamodule!r:.60}", line))
    for name, loader in loaders.items():
        own = getattr(datamodule, name, None)
        if loader is not None and own is not None and is_overridden(name, datamodule, LightningDataModule):
            received = f"both, so that {type(datamodule).__name__}.{name} would be ignored"
            raise ConfigurationError(explain("a loader or a datamodule that makes it", received, fix))


def check_methods(module: LightningModule, datamodule: Any, callbacks: Iterable[Any]) -> None:
    """Name hooks that nobody calls, and methods that cannot be called as a loop calls them.

    Raises:
        ConfigurationError: for a step that is a generator or a coroutine, or a hook with another signature.
    """
    owners = [(module, LightningModule), (datamodule, LightningDataModule), *((c, Callback) for c in callbacks)]
    forgotten: dict[str, str] = {}
    for owner, base in owners:
        for name, function in _own_methods(owner, base):
            known = hasattr(base, name)
            if known and (name.endswith("_step") or name.startswith("on_")):
                _check_kind(owner, name, function)
            if name in _hooks_of(base):
                _check_signature(owner, name, getattr(base, name))
            elif not known and (meant := _meant(name, base)) is not None:
                forgotten[f"{type(owner).__name__}.{name}"] = meant
    if forgotten:
        received = ", ".join(forgotten)
        fix = "; ".join(f"def {meant}(self, ...)" for meant in dict.fromkeys(forgotten.values()))
        warnings.warn(explain("hooks that are called", f"{received}: nobody calls them", fix), stacklevel=2)


@cache
def _hooks_of(base: type) -> frozenset[str]:
    """Return the names of what a run calls on a user's object of type `base`."""
    classes = [ModuleHooks, BatchHooks] if base is LightningModule else [base, BatchHooks][: 1 + (base is not Callback)]
    return frozenset(n for c in classes for n, f in vars(c).items() if inspect.isfunction(f) and not n.startswith("_"))


def _own_methods(owner: Any, base: type) -> list[tuple[str, Any]]:
    """Return the functions that the user's classes define, by name."""
    if owner is None:
        return []
    classes = [c for c in type(owner).__mro__ if not c.__module__.startswith(("xtrain.", "torch.")) and c is not object]
    names = dict.fromkeys(name for c in classes for name in vars(c))
    return [(name, f) for name in names if inspect.isfunction(f := inspect.getattr_static(owner, name, None))]


def _meant(name: str, base: type) -> str | None:
    """Return the hook of `base` that somebody meant who wrote `name`, or None if it looks like no hook."""
    if name in _OLDER:
        return _OLDER[name]
    hooks = [known for known in dir(base) if known.startswith("on_")]
    close = difflib.get_close_matches(name, hooks, n=1, cutoff=0.88) if name.startswith("on_") else []
    return close[0] if close else None


def _check_kind(owner: Any, name: str, function: Any) -> None:
    kinds = {"a generator (it has a yield)": inspect.isgeneratorfunction, "a coroutine": inspect.iscoroutinefunction,
             "an asynchronous generator": inspect.isasyncgenfunction}  # fmt: skip
    if "dataloader_iter" in inspect.signature(function).parameters:
        fix = f"def {name}(self, batch, batch_idx)"
        raise ConfigurationError(explain(f"{name} to take batches", "dataloader_iter, the iterator of them", fix))
    for kind, is_kind in kinds.items():
        if is_kind(function):
            where = f"{type(owner).__name__}.{name}"
            fix = f"def {name}(self, ...): ... return loss"
            raise ConfigurationError(explain(f"{where} to be a plain function", f"{kind}, which would never run", fix))


def _check_signature(owner: Any, name: str, contract: Any) -> None:
    """Check that a hook takes what it is called with: the arguments that `contract` has, by position."""
    wanted = list(inspect.signature(contract).parameters)[1:]
    signature = inspect.signature(getattr(owner, name))
    try:
        signature.bind(*wanted)
    except TypeError:
        shown = f"{type(owner).__name__}.{name}{signature}"
        line = f"def {name}(self, {', '.join(wanted)}): ..." if wanted else f"def {name}(self): ..."
        raise ConfigurationError(explain(f"{name} with the arguments it is called with", shown, line)) from None


def odd_optimizers(module: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[str]:
    """Return what is to be said: that there is no optimizer, or that one holds parameters that are not the module's."""
    if not optimizers:
        expected = f"an optimizer from {type(module).__name__}.configure_optimizers"
        yield explain(expected, "none: nothing is trained by one", "return torch.optim.Adam(self.parameters())")
    own = set(module.parameters())
    for index, optimizer in enumerate(optimizers):
        strange = [p for group in optimizer.param_groups for p in group["params"] if p not in own]
        if strange:
            expected = f"optimizer {index} ({type(optimizer).__name__}) to hold parameters of the module"
            shapes = ", ".join(str(tuple(p.shape)) for p in strange[:3])
            received = f"{len(strange)} others (shapes {shapes}), which no checkpoint has, and not every backend moves"
            yield explain(expected, received, "self.image = torch.nn.Parameter(image) in __init__")


class IdleWatch:
    """Says once that a fit trains nothing: after its first epoch, or `IDLE_BATCHES` of it.

    Args:
        run: the fit, before its first batch.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._told = run, not run.life.optimizers
        self._steps, self._batches = run.trainer.global_step, run.trainer.progress.batches
        self._versions, self._tried = self._of_parameters(), self._attempts()

    def _attempts(self) -> int:
        return sum(o.step_count + o.skipped_steps for o in self._run.life.optimizers)

    def _of_parameters(self) -> list[int]:
        return [p._version for p in self._run.module.parameters()]

    def look(self) -> None:
        """Look whether a training step counted since the fit began, or a raw optimizer has moved something."""
        trainer = self._run.trainer
        if self._told or trainer.global_step > self._steps or self._attempts() > self._tried:
            return
        if trainer.progress.batches == self._batches:
            return
        self._told = True
        if self._versions != self._of_parameters() and trainer.max_steps < 0:
            return
        count = trainer.progress.batches - self._batches
        names = ", ".join(map(repr, self._run.life.optimizers))
        received = f"none of {names} in {count} batches"
        warnings.warn(explain("a step of an optimizer", received, "opt.step() in training_step"), stacklevel=2)
