"""Between two training steps: checkpoints that are due, and the end of a run that is told to make room."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from xtrain.checkpoint.places import Place, place
from xtrain.checkpoint.stores import store_of
from xtrain.collectives import Collectives
from xtrain.data.position import is_used_up
from xtrain.errors import CheckpointError, explain
from xtrain.run.state import Run, TrainerState

logger = logging.getLogger("xtrain")

EXIT_STATUS = 75
"""EX_TEMPFAIL: start it again, and it goes on."""
NOTE = "preempted.json"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1) if hasattr(signal, "SIGUSR1") else (signal.SIGTERM,)


class Preemption:
    """Notices signals that ask this run to end soon, and lets all ranks act on them after the same step.

    Inside the context the handlers only set a flag. About once a second the ranks ask each other.

    Attributes:
        ranks: the processes of the run, once they are known.
        received: the signal, if there was one.
    """

    def __init__(self) -> None:
        self.ranks = Collectives()
        self.received: int | None = None
        self._steps = 0
        self._next = 1
        self._since = time.monotonic()

    def _note(self, number: int, frame: Any) -> None:
        self.received = number

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Handle the signals inside; in a thread that is not the main one nothing is handled."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def due(self) -> bool:
        """Return whether a rank was told to end; asked by all ranks after the same steps."""
        if self.ranks.world_size == 1:
            return self.received is not None
        self._steps += 1
        if self._steps < self._next:
            return False
        rate = self._steps / max(time.monotonic() - self._since, 1e-6)
        told = float(self.received or 0)
        told, rate = self.ranks.all_reduce(torch.tensor([told, rate], dtype=torch.float64), "max").tolist()
        self._next, self._steps, self._since = max(1, min(10_000, int(rate))), 0, time.monotonic()
        if told:
            self.received = int(told)
        return bool(told)


class SafePoints:
    """What happens where the state is whole: after a batch with everything that follows it, and after an epoch.

    Args:
        run: a fit.
        savers: callbacks with ``at_safe_point``.
        preemption: asked at every point.
    """

    def __init__(self, run: Run, savers: Sequence[Any], preemption: Preemption) -> None:
        self._run, self._savers, self._preemption = run, savers, preemption

    def reach(self, kind: str) -> None:
        """Save what is due.

        Args:
            kind: ``"batch"`` inside of an epoch, ``"cut"`` where the training ends inside of one, ``"epoch"`` after
                its end.

        Raises:
            SystemExit: with status 75, after a signal; the state is saved.
        """
        for saver in self._savers:
            saver.at_safe_point(self._run.trainer, kind)
        preemption = self._preemption
        if (preemption.received is not None or preemption.ranks.world_size > 1) and preemption.due():
            self._end()

    def _end(self) -> None:
        trainer, step = self._run.trainer, self._run.trainer.global_step
        for saver in self._savers[1:]:
            saver.wait()
        first = self._savers[0]
        try:
            name = place(first.save_preempted(trainer)).name
        except CheckpointError as error:
            name = place(first.last_model_path).name
            warnings.warn(f"Preempted, and {name or 'nothing'} is what there is to go on from. {error}", stacklevel=2)
        if trainer.global_rank == 0:
            told = signal.Signals(self._preemption.received or signal.SIGTERM).name
            folder = place(first.dirpath)
            try:
                write_note(folder, {"checkpoint": name or None, "signal": told, "global_step": step})
            except OSError as error:
                warnings.warn(f"{NOTE} was not written: {type(error).__name__}: {error}", stacklevel=2)
            logger.warning("Preempted after step %d: to go on from %s with ckpt_path='last'.", step, folder / name)
        raise SystemExit(EXIT_STATUS)


def write_note(folder: Place, facts: dict[str, Any]) -> None:
    """Say in `folder` that a run was preempted, for whoever starts it again."""
    store_of(folder).write_text(folder / NOTE, json.dumps(facts | {"time": time.time()}, indent=2) + "\n")


@contextmanager
def preemptible(trainer: TrainerState) -> Iterator[Preemption]:
    """Notice signals inside, from the set-up on, if a callback of `trainer` can save what was trained."""
    preemption = Preemption()
    with preemption.watching() if savers_of(trainer) else nullcontext():
        yield preemption


@contextmanager
def safe_points(run: Run, preemption: Preemption) -> Iterator[None]:
    """Let a fit save inside, if a callback of its Trainer does.

    Args:
        run: a fit; one with ``fast_dev_run`` saves nothing.
        preemption: notices signals.
    """
    savers = savers_of(run.trainer)
    if not savers:
        yield
        return
    if run.trainer.global_rank == 0:
        (place(savers[0].dirpath) / NOTE).unlink(missing_ok=True)
    if is_used_up(run.plan.loader):
        received = "an iterator: a run that goes on reads whatever it gives then"
        fix = "trainer.fit(model, DataLoader(dataset, batch_size=64)), or a list"
        warnings.warn(explain("a loader whose position a checkpoint can keep", received, fix), stacklevel=3)
    preemption.ranks = run.backend.collectives
    run.points = SafePoints(run, savers, preemption)
    yield


def savers_of(trainer: TrainerState) -> list[Any]:
    """Return the callbacks that save; none in a trial run."""
    savers = [callback for callback in trainer.callbacks if hasattr(callback, "at_safe_point")]
    return [] if trainer.fast_dev_run else savers
