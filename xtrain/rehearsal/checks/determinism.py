"""Whether a training can be repeated, bit by bit: with the same seed, and when it goes on from its middle."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from xtrain.errors import XTrainError
from xtrain.rehearsal.check import Check, Request, Yield
from xtrain.rehearsal.checks.traces import BEFORE, Difference, Record, Tracer, first_difference
from xtrain.rehearsal.copies import can_copy, in_copy
from xtrain.rehearsal.findings import Figure, Finding, Severity, Skipped
from xtrain.rehearsal.places import Place, place_of_layer, place_of_loader
from xtrain.rehearsal.subject import Subject

_LEAST_STEPS = 4
_RESUME = "determinism: going on from a checkpoint"
_SEED_FIX = "torch.rand, random.random, numpy.random.rand: seed_everything seeds them, and a checkpoint has their state"
_LOADER_FIX = "a DataLoader: its order is that of seed and epoch; or state_dict and load_state_dict in the dataset"
_STATE_FIX = 'self.register_buffer("count", torch.zeros(())), or on_save_checkpoint and on_load_checkpoint'


class Determinism(Check):
    """Trains twice with one seed, and a third time from a checkpoint of the middle, each in a copy of the process."""

    name: ClassVar[str] = "determinism"
    ids: ClassVar[dict[str, Severity]] = {"XT-SEED-01": "warning", "XT-SEED-02": "error"}
    group: ClassVar[str] = "determinism"  # a process that has trained may have threads, which no copy has

    def run(self, request: Request) -> Iterator[Yield]:
        """Compare the parameters after every step of an optimizer."""
        if not can_copy():
            yield Skipped(self.name, "it needs os.fork, which this system does not have: Linux or macOS")
            return
        steps = max(request.steps, _LEAST_STEPS)
        with TemporaryDirectory() as folder:
            yield from _compare(request.subject, steps, f"{folder}/middle.ckpt")


def _compare(subject: Subject, steps: int, path: str) -> Iterator[Yield]:
    first = in_copy(partial(_train, subject, steps))
    if isinstance(first, Finding):
        yield first
        return
    middle = _middle(steps, first.batches)
    second = in_copy(partial(_train, subject, steps, save=(middle, path)))
    if isinstance(second, Finding):
        yield second
        return
    found = first_difference(first, second)
    yield Figure("determinism.same_seed", found is None)
    if found is not None:
        yield _other_numbers(subject, found)
        yield Skipped(_RESUME, "two trainings from the beginning differ already (XT-SEED-01)")
    elif second.refused:
        yield Skipped(_RESUME, second.refused)
    else:
        yield from _resumed(subject, first.after(middle), steps, middle, path)


def _resumed(subject: Subject, whole: Record, steps: int, middle: int, path: str) -> Iterator[Yield]:
    rest = in_copy(partial(_train, subject, steps - middle, begins=middle, ckpt_path=path))
    if isinstance(rest, Finding):
        text = f"a training that goes on from a checkpoint of step {middle} ends here. {rest.message}"
        yield Finding("XT-SEED-02", text, rest.fix, rest.file, rest.line)
    elif rest.refused:
        yield Skipped(_RESUME, rest.refused)
    else:
        found = first_difference(whole, rest.after(middle))
        yield Figure("determinism.resume", found is None)
        if found is not None:
            yield _other_state(subject, found, middle)


def _middle(steps: int, batches: float) -> int:
    """Return after which step to save: in the middle of an epoch, if an epoch has one."""
    middle = steps // 2
    return middle + 1 if batches > 1 and middle % batches == 0 else middle


def _train(
    subject: Subject, steps: int, begins: int = 0, save: tuple[int, str] | None = None, ckpt_path: str | None = None
) -> Record:
    tracer = _SavingTracer(begins, save)
    with tracer.operations:
        module = subject.module()
        try:
            subject.fit(module, steps, [tracer], ckpt_path=ckpt_path)
        except XTrainError as error:
            if ckpt_path is None:
                raise
            tracer.record.refused = str(error)
    return tracer.record


class _SavingTracer(Tracer):
    """Saves a checkpoint after a step, too."""

    def __init__(self, begins: int, save: tuple[int, str] | None) -> None:
        super().__init__(begins)
        self._save, self._ended = save, 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        self._ended += 1
        if self._save is not None and self._ended == self._save[0]:
            try:
                trainer.save_checkpoint(Path(self._save[1]))
            except XTrainError as error:
                self.record.refused = str(error)


# ---------------------------------------------------------------- findings


def _other_numbers(subject: Subject, found: Difference) -> Finding:
    text = f"the same seed gives other parameters in a second training: {_where(found)}"
    if found.in_batch:
        text += "; the batches differ before"
    return Finding("XT-SEED-01", text, _SEED_FIX, *_place(subject, found))


def _other_state(subject: Subject, found: Difference, middle: int) -> Finding:
    begin = f"a training that goes on from a checkpoint of step {middle} gives other parameters: {_where(found)}"
    place = _place(subject, found)
    if found.in_batch:
        return Finding("XT-SEED-02", f"{begin}; it gets other batches", _LOADER_FIX, *place, severity="warning")
    return Finding("XT-SEED-02", f"{begin}; this depends on what no checkpoint has", _STATE_FIX, *place)


def _where(found: Difference) -> str:
    if found.optimizer == BEFORE:
        return f"{found.parameter or 'a parameter'} differs before the first step"
    what = f"{found.parameter} differs" if found.parameter else "it does not step in both"
    return f"first in step {found.step} of {found.optimizer}, where {what}"


def _place(subject: Subject, found: Difference) -> Place:
    """Return the first line that computed something else, or what is known about where it comes from."""
    if found.place.line:
        return found.place
    module = subject.module()
    if found.in_batch:
        return place_of_loader(subject.loader(module), module)
    return place_of_layer(module, found.parameter.rpartition(".")[0])
