"""`Profiler`: where the time of a training step goes, by `torch.profiler`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import profile, record_function, schedule

from xtrain.callbacks.base import Callback
from xtrain.errors import ConfigurationError, explain

if TYPE_CHECKING:
    from xtrain.module import LightningModule
    from xtrain.trainer import Trainer

# Verbs of the backend, by the names they get in the trace.
_VERBS = {
    "batch_to_device": "xtrain.batch_to_device",
    "zero_grad": "xtrain.zero_grad",
    "backward": "xtrain.backward",
    "finalize_gradients": "xtrain.finalize_gradients",
    "clip_gradients": "xtrain.clip_gradients",
    "step": "xtrain.step",
    "step_boundary": "xtrain.step_boundary",
}
_STEP = "xtrain.training_step"
_NAMES = ("simple", "advanced", "pytorch")


class Profiler(Callback):
    """Profiles some training steps: prints the time per verb of the step, and writes a trace.

    The trace opens in https://ui.perfetto.dev; it lies in the folder of the first logger, else in
    ``default_root_dir``, as ``trace_rank0.json``.

    Args:
        wait: training steps before anything is done.
        warmup: steps that are recorded and dropped.
        active: steps that are kept.
        profiler: a `torch.profiler.profile` of your own instead; it is started, stepped and stopped.
        **kwargs: passed on to `torch.profiler.profile`: ``with_stack=True``, ``profile_memory=True``, ...

    Example:
        >>> trainer = Trainer(callbacks=[Profiler(active=10, with_stack=True)])
    """

    def __init__(
        self, wait: int = 1, warmup: int = 1, active: int = 10, profiler: profile | None = None, **kwargs: Any
    ) -> None:
        self._given, self._kwargs = profiler, kwargs
        self._steps = {"wait": wait, "warmup": warmup, "active": active, "repeat": 1}
        self._profile: profile | None = None
        self._folder = Path()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Name the verbs, and start."""
        for verb, name in _VERBS.items():
            vars(trainer.backend)[verb] = _recorded(getattr(trainer.backend, verb), name)
        self._folder = Path(trainer.log_dir) if trainer.log_dir else Path(trainer.default_root_dir)
        self._profile = self._given or profile(
            schedule=schedule(**self._steps), on_trace_ready=lambda done: self._report(trainer, done), **self._kwargs
        )
        self._profile.start()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell the schedule that a step is over."""
        if self._profile is not None:
            self._profile.step()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop, which reports what there is if the training was shorter than the schedule."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Leave the backend as it was, also after an exception."""
        self.on_train_end(trainer, module)
        for verb in _VERBS:
            vars(trainer.backend).pop(verb, None)

    def _report(self, trainer: Trainer, done: profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"trace_rank{trainer.global_rank}.json"
        done.export_chrome_trace(str(path))
        events = done.key_averages()
        verbs = [event for event in events if event.key in _VERBS.values()]
        order = "self_cpu_time_total" if not torch.accelerator.is_available() else "self_device_time_total"
        table = type(events)(verbs or list(events)).table(sort_by=order, row_limit=20)
        trainer.print(f"{table}\nTrace: {path} (open it in https://ui.perfetto.dev)")


def _recorded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return wrapper


def as_profiler(asked: Any) -> Profiler:
    """Return the `Profiler` that ``Trainer(profiler=...)`` asks for.

    Args:
        asked: True or one of Lightning's names, a dict of arguments, a `torch.profiler.profile`, or a `Profiler`.

    Raises:
        ConfigurationError: for anything else.
    """
    if isinstance(asked, Profiler):
        return asked
    if isinstance(asked, profile):
        return Profiler(profiler=asked)
    if isinstance(asked, dict):
        return Profiler(**asked)
    if asked is True or asked in _NAMES:
        return Profiler()
    fix = "Trainer(profiler=True), or Trainer(profiler=torch.profiler.profile(...))"
    raise ConfigurationError(explain(f"profiler=True, one of {_NAMES}, or a torch profiler", repr(asked), fix))
