"""What Python does in a step beside tensors: what it reads decides when a replay is right, what it writes is repeated.

Attributes of the module and of the user's own submodules are watched by a subclass that they have for the time of
one step. What a replay could not repeat becomes a `Problem`.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from xtrain.compiled.questions import Answers, WatchedInt, WatchedProgress
from xtrain.compiled.recording import Problem, user_location
from xtrain.module import LightningModule
from xtrain.run.progress import Progress
from xtrain.run.state import Run

PLAIN = (bool, int, float, str, bytes, type(None))
_MISSING = object()
_DEPTH, _ITEMS = 3, 500  # how far containers are looked into
_CONTAINERS = (dict, list, tuple, deque, set, frozenset)
_LOOKS = {"callback_metrics", "logged_metrics", "progress_bar_metrics", "logger", "loggers"}
_IN_PLACE_FIX = "self.log(...) a tensor, return it from training_step, or do this in on_train_batch_end"

Guard = tuple[dict[str, Any], str, Any]


class Watch:
    """What one step read and wrote.

    Attributes:
        answers: what it asked of the numbers of the loop.
        guards: what it read before it wrote it, as ``(namespace, name, value)``.
        written: the attributes it set, as ``(namespace, name): value``.
        problems: what a replay would miss.
        containers: the containers among what it read, each with its `fingerprint`.
        scheduled: the schedulers that were stepped, in order.
    """

    def __init__(self) -> None:
        self.scheduled: list[Any] = []
        self.answers = Answers()
        self.guards: list[Guard] = []
        self.written: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        self.problems: list[Problem] = []
        self._known: set[tuple[int, str]] = set()
        self._held: list[tuple[str, Any, Any]] = []
        self.containers: list[tuple[Any, Any]] = []

    def read(self, space: dict[str, Any], name: str, value: Any) -> None:
        """Note that the step read an attribute."""
        if (id(space), name) in self._known:
            return
        self._known.add((id(space), name))
        self.guards.append((space, name, value))
        if not isinstance(value, (*PLAIN, Tensor, nn.Module)):
            self._held.append((name, value, fingerprint(value)))
            if isinstance(value, _CONTAINERS):
                self.containers.append((value, fingerprint(value)))
            else:
                inside = getattr(value, "__dict__", {})
                self.guards += [(inside, key, item) for key, item in list(inside.items())[:_ITEMS]]

    def write(self, space: dict[str, Any], name: str, value: Any) -> None:
        """Note that the step set an attribute."""
        self._known.add((id(space), name))
        self.written[id(space), name] = (space, name, value)
        if not isinstance(value, (*PLAIN, Tensor)):
            what = f"self.{name} was set to a {type(value).__name__}"
            self.problems.append(Problem(what, "keep tensors and numbers in attributes of their own", user_location()))

    def looked(self, name: str) -> None:
        """Note that the step looked at something of the Trainer that another step may find changed."""
        what = f"trainer.{name} was used in the step"
        self.problems.append(Problem(what, "use it in on_train_batch_end", user_location()))

    def close(self) -> None:
        """Look what became of the containers that the step read."""
        for name, value, before in self._held:
            if fingerprint(value) != before:
                self.problems.append(Problem(f"self.{name} was changed in place", _IN_PLACE_FIX))


def fingerprint(value: Any, depth: int = _DEPTH) -> Any:
    """Return what changes when a container, or an object, is changed in place."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor) or depth == 0:
        return id(value)
    if isinstance(value, dict):
        return [(id(k), fingerprint(v, depth - 1)) for k, v in list(value.items())[:_ITEMS]] + [len(value)]
    if isinstance(value, list | tuple | deque | set | frozenset):
        return [fingerprint(v, depth - 1) for v in list(value)[:_ITEMS]] + [len(value)]
    return [id(value), fingerprint(dict(getattr(value, "__dict__", {})), depth - 1)]


_OF_XTRAIN = frozenset(vars(LightningModule())) - {"automatic_optimization"}


def _watching(kind: Any, watch: Watch) -> Any:
    """Return a subclass of the module class `kind` that tells `watch`."""

    def read(self: Any, name: str) -> Any:
        value = kind.__getattribute__(self, name)
        space = object.__getattribute__(self, "__dict__")
        if name == "hparams":
            watch.read(space, "_hparams", space["_hparams"])
        if name in _OF_XTRAIN or name[:2] == "__":
            return value
        if name in space:
            watch.read(space, name, value)
        return value

    def write(self: Any, name: str, value: Any) -> None:
        kind.__setattr__(self, name, value)
        space = object.__getattribute__(self, "__dict__")
        if name in space and name not in _OF_XTRAIN:
            watch.write(space, name, value)

    names = {"__getattribute__": read, "__setattr__": write, "__module__": kind.__module__, "__slots__": ()}
    return type(kind)(kind.__name__, (kind,), {**names, "__qualname__": kind.__qualname__})


_OF_A_CLASS = {"__module__", "__doc__", "__getattribute__", "__setattr__", "__slots__", "__annotations__"}


def _attributes_of_classes(kinds: dict[type, Any], watch: Watch) -> None:
    """Put what the step set on a class where it belongs."""
    for kind, watching in kinds.items():
        for name, value in vars(watching).items():
            if name not in _OF_A_CLASS:
                setattr(kind, name, value)
                watch.problems.append(Problem(f"{kind.__name__}.{name} was set", _IN_PLACE_FIX))


def _looking(kind: Any, watch: Watch) -> Any:
    """Return a subclass of the Trainer class `kind` that tells `watch` who looks at metrics and loggers."""

    def read(self: Any, name: str) -> Any:
        if name in _LOOKS:
            watch.looked(name)
        return kind.__getattribute__(self, name)

    return type(kind.__name__, (kind,), {"__getattribute__": read, "__module__": kind.__module__})


def _settings_of(layer: nn.Module) -> list[Guard]:
    """Return what a layer of torch computes with, such as the probability of a dropout."""
    space = vars(layer)
    return [(space, k, v) for k, v in space.items() if isinstance(v, PLAIN) and k[0] != "_" and k != "training"]


def _is_users(module: nn.Module) -> bool:
    return not type(module).__module__.startswith("torch.")


@contextmanager
def watched(run: Run) -> Iterator[Watch]:
    """Watch what Python does inside the context."""
    watch = Watch()
    trainer, progress = run.trainer, run.trainer.progress
    before = _outside_world(run)
    with ExitStack() as stack:
        kinds: dict[type, Any] = {}
        stack.callback(_attributes_of_classes, kinds, watch)
        for module in run.module.modules():
            if not _is_users(module):
                watch.guards += _settings_of(module)
            else:
                kind = type(module)
                if kind not in kinds:
                    kinds[kind] = _watching(kind, watch)
                stack.callback(object.__setattr__, module, "__class__", kind)
                object.__setattr__(module, "__class__", kinds[kind])
        stack.callback(setattr, trainer, "__class__", type(trainer))
        trainer.__class__ = _looking(type(trainer), watch)
        stack.callback(_plain_again, progress)
        vars(progress)["answers"] = watch.answers
        progress.__class__ = WatchedProgress
        stack.enter_context(_no_new_seeds(watch))
        stack.enter_context(_schedulers(run, watch, before))
        yield watch
    watch.close()
    for name, value in _outside_world(run).items():
        if value != before[name]:
            watch.problems.append(_OUTSIDE[name])


def _plain_again(progress: Progress) -> None:
    progress.__class__ = Progress
    space = vars(progress)
    del space["answers"]
    for name, value in space.items():
        if isinstance(value, WatchedInt):
            space[name] = value.plain


_OUTSIDE = {
    "random": Problem("Python's random was used", "torch.rand(())"),
    "numpy": Problem("NumPy's random numbers were used", "torch.rand(())"),
    "rates": Problem("a learning rate was changed in the step", "scheduler.step() in on_train_batch_end"),
    "schedulers": Problem("a scheduler was stepped in the step", "scheduler.step() in on_train_batch_end"),
    "optimizers": Problem("an optimizer counts in Python", "torch.optim's optimizers, or a count that is a tensor"),
    "should_stop": Problem("trainer.should_stop was set in the step", "set it in on_train_batch_end"),
    "storage": Problem("a parameter got another memory (p.data = ...)", "p.copy_(...) under torch.no_grad()"),
}


def _outside_world(run: Run) -> dict[str, Any]:
    """Return what a step should leave alone, or could not repeat."""
    numpy = sys.modules.get("numpy")
    groups = [group for o in run.life.optimizers for group in o.optimizer.param_groups]
    return {
        "random": random.getstate(),
        "numpy": None if numpy is None else [str(part) for part in numpy.random.get_state(legacy=True)],
        "rates": [(id(rate), float(rate)) if isinstance(rate := group["lr"], Tensor) else rate for group in groups],
        "schedulers": [getattr(config.scheduler, "last_epoch", None) for config in run.schedulers],
        "optimizers": [_counts_of(o.optimizer) for o in run.life.optimizers],
        "should_stop": run.trainer.should_stop,
        "storage": [tensor.data_ptr() for tensor in (*run.module.parameters(), *run.module.buffers())],
    }


def _counts_of(optimizer: Any) -> list[Any]:
    """Return the plain values that an optimizer keeps, in attributes and in the states of parameters."""
    own = [(k, v) for k, v in vars(optimizer).items() if isinstance(v, PLAIN) and k[0] != "_"]
    kept = [(k, v) for held in optimizer.state.values() for k, v in held.items() if isinstance(v, PLAIN)]
    return [own, kept]


@contextmanager
def _schedulers(run: Run, watch: Watch, world: dict[str, Any]) -> Iterator[None]:
    """Note which schedulers are stepped; what changes by that is expected in the `world` after the step."""

    def noting(scheduler: Any) -> Callable[..., Any]:
        step = scheduler.step

        def call(*args: Any, **kwargs: Any) -> Any:
            watch.scheduled.append(scheduler)
            if args or kwargs:
                what = "a scheduler was given a value in the step"
                watch.problems.append(Problem(what, "scheduler.step(value) in on_train_epoch_end", user_location()))
            unchanged = _outside_world(run)["rates"] == world["rates"]
            result = step(*args, **kwargs)
            if unchanged:
                world.update({name: _outside_world(run)[name] for name in ("rates", "schedulers")})
            return result

        return call

    held = [(vars(config.scheduler), vars(config.scheduler).get("step"), config.scheduler) for config in run.schedulers]
    for space, _, scheduler in held:
        space["step"] = noting(scheduler)
    try:
        yield
    finally:
        for space, step, _ in held:
            del space["step"]
            space.update({} if step is None else {"step": step})


@contextmanager
def _no_new_seeds(watch: Watch) -> Iterator[None]:
    """Note whoever sets the state of torch's generator, as activation checkpointing does."""
    names = ("set_rng_state", "manual_seed", "seed")
    places = [(place, name, getattr(place, name)) for place in (torch, torch.random) for name in names]

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            what = f"torch.{function.__name__} was called (by activation checkpointing?)"
            watch.problems.append(Problem(what, "compile='networks'", user_location()))
            return function(*args, **kwargs)

        return call

    for place, name, function in places:
        setattr(place, name, noting(function))
    try:
        yield
    finally:
        for place, name, function in places:
            setattr(place, name, function)
