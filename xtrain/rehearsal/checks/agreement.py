"""Whether the module trains the same everywhere: on each backend, in each precision, and on two processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from xtrain.compat.backends import FALLBACK
from xtrain.errors import XTrainError
from xtrain.on_cpu import OnCPU
from xtrain.precision import PRECISIONS, Precision
from xtrain.registry import get_backend_class, registered_backends
from xtrain.rehearsal.check import PROCESSES, Check, Request, Yield
from xtrain.rehearsal.checks.calls import NUMBERS, OTHER_LINES, PAIRS, STATISTIC, SUMS, first_parting
from xtrain.rehearsal.checks.halves import halved, reading
from xtrain.rehearsal.checks.moves import (
    NOBODYS,
    Difference,
    Likeness,
    Record,
    comparable,
    distance,
    finite,
    first_difference,
    judged,
)
from xtrain.rehearsal.checks.protocol import is_told
from xtrain.rehearsal.checks.trainings import PATIENCE, Answer, Refusal, Training, on_two, trained
from xtrain.rehearsal.copies import can_copy
from xtrain.rehearsal.findings import Figure, Finding, Severity, Skipped
from xtrain.rehearsal.places import NOWHERE, place_of_layer, place_of_method

WHOLE = "32-true"
_ROUNDING = 1e-6  # relative, by which parameters of a reference are moved, for what computes in fp32
_REFERENCES = 2
_SECONDS, _SLOW = 90.0, 50.0  # for all trainings, and for one with the imports of its backend
_SCALES = (2.0**16, 2.0**10)  # of losses: the one that a training begins with, and one that overflows less
_FIXES = {
    SUMS: "the mean over the batch, .mean(): xtrain averages the gradients of the processes",
    PAIRS: "self.all_gather(value, sync_grads=True) before samples are compared with each other",
    STATISTIC: "a mean over the batch alone, or self.all_gather(value, sync_grads=True) before this line",
    OTHER_LINES: "the same calls on every process; rank_zero_only for what prints or writes",
    NUMBERS: "",
}
_REASONS = {
    SUMS: "a sum over the batch is computed there, and the mean of two halves is half of it",
    PAIRS: "samples of a batch are compared with each other there, and each process has its own half",
    STATISTIC: "what is computed there depends on the whole batch, of which each process has a half",
    OTHER_LINES: "not all processes run this line",
    NUMBERS: "",
}


class Agreement(Check):
    """Trains in copies of the process, and compares how far each parameter has moved after each step."""

    name: ClassVar[str] = "agreement"
    ids: ClassVar[dict[str, Severity]] = {
        "XT-AGREE-01": "error",
        "XT-AGREE-02": "warning",
        "XT-AGREE-03": "error",
        "XT-AGREE-04": "error",
    }
    targets: ClassVar[tuple[str, ...]] = tuple({*PRECISIONS, PROCESSES, *registered_backends()} - {FALLBACK, WHOLE})
    group: ClassVar[str] = "agreement"  # copies of a process in which nothing was trained: torch_xla needs that
    seconds: ClassVar[float] = 110.0

    def run(self, request: Request) -> Iterator[Yield]:
        """Compare all that was asked for with the cpu in fp32."""
        if not can_copy():
            yield Skipped(self.name, "it needs os.fork, which this system does not have: Linux or macOS")
            return
        comparison = _Comparison(request)
        yield from comparison.reference()
        if comparison.whole is not None:
            if PROCESSES in request.targets or (request.devices or 1) > 1:
                yield from comparison.processes()
            yield from comparison.precisions()
            yield from comparison.backends()
            yield Figure("agreement.difference", comparison.distances)


@dataclass(frozen=True)
class _Told:
    """How the difference between a target and the reference is told."""

    id: str
    target: str
    where: str
    elsewhere: str = ""  # id of the finding by which another check tells an error


class _Comparison:
    """The trainings, one after the other; `whole` is that on the cpu in fp32, once it is known to be of use."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._module = request.subject.module()
        self._batches = request.subject.batches(self._module, request.steps)
        self._make = partial(Training, reading(request.subject, self._batches), request.steps)
        self.whole: Record | None = None
        self.distances: dict[str, float] = {}
        self._moved: dict[float, list[Record]] = {}
        asked_for_all = {*PRECISIONS, PROCESSES, *registered_backends()} <= request.targets
        self._explicit = not asked_for_all
        self._end = time.monotonic() + _SECONDS

    def _trained(self, *trainings: Training) -> list[Answer]:
        """Run the trainings at the same time; what no line of the user's has to do with is a refusal."""
        left = self._end - time.monotonic()
        try:
            if left > 0:
                return trained(*trainings, seconds=min(left, _SLOW if len(trainings) == 1 else 2 * PATIENCE))
            text = f"the {_SECONDS:.0f} s of this check are over: fewer --steps, or this target alone"
        except TimeoutError:
            text = f"it did not end in time ({_SECONDS:.0f} s for all that is compared)"
        except RuntimeError as error:
            text = " ".join(str(error).split())
        return [Refusal("missing", text, "", NOWHERE)]

    # ---------------------------------------------------------------- references

    def reference(self) -> Iterator[Yield]:
        """Train on the cpu in fp32; a second time, to see that this can be repeated."""
        whole = self._trained(self._make(lines=True))[0]
        if not isinstance(whole, Record):
            reason = whole.message if isinstance(whole, Finding) else whole.text
            yield Skipped("agreement", f"the training on {FALLBACK} in {WHOLE}, which is the measure: {reason}")
        elif not finite(whole):
            yield Skipped("agreement", f"parameters are not finite on {FALLBACK} in {WHOLE}, with nothing to compare")
        else:
            again = self._trained(self._make(source=whole.draws))[0]
            if isinstance(again, Record) and distance(whole, again) == 0 and comparable(whole, again):
                self.whole = whole
            elif isinstance(again, Refusal):
                yield Skipped("agreement", again.text)
            else:
                yield Skipped("agreement", "the same training differs when it is repeated with the same random numbers")

    def _references(self, moved_by: float) -> list[Record]:
        """Return trainings whose parameters begin with an error of rounding: how much becomes of it?"""
        assert self.whole is not None
        if moved_by not in self._moved:
            seeds = range(1, _REFERENCES + 1)
            made = [self._make(source=self.whole.draws, moved_by=moved_by, seed=seed) for seed in seeds]
            self._moved[moved_by] = [record for record in self._trained(*made) if isinstance(record, Record)]
        return self._moved[moved_by]

    def _likeness(self, precision: Precision) -> Likeness:
        dtype = precision.parameter_dtype or precision.autocast_dtype
        stored = torch.finfo(precision.parameter_dtype or torch.float32).eps / 2
        if dtype is None:
            return Likeness(1e-3, stored, 16.0, stored, False, self._references(_ROUNDING))
        unit = torch.finfo(dtype).eps / 2
        return Likeness(0.1, stored, 4.0, unit, True, self._references(unit))

    # ---------------------------------------------------------------- targets

    def precisions(self) -> Iterator[Yield]:
        """Train in each precision."""
        assert self.whole is not None
        possible = get_backend_class(FALLBACK).capabilities.precisions
        for name in sorted((self._request.targets & set(PRECISIONS)) - {WHOLE}):
            if name not in possible:
                yield Skipped(
                    f"agreement: {name}", f"{FALLBACK} does not train in {name}: a device that does is needed"
                )
                continue
            told = _Told("XT-AGREE-02", name, f"in {name}")
            yield from self._compared(told, self._in(PRECISIONS[name], self.whole), PRECISIONS[name])

    def _in(self, precision: Precision, whole: Record) -> list[Answer]:
        """Train in `precision`, with a smaller loss scale if the first one makes a step overflow."""
        answers: list[Answer] = []
        for scale in _SCALES if precision.loss_scaling else (None,):
            scaling = {} if scale is None else {"scaler_kwargs": {"init_scale": scale}}
            options = {"precision": precision.name, **scaling}
            answers = self._trained(self._make(source=whole.draws, lines=True, options=options))
            if not any(isinstance(answer, Record) and answer.skipped for answer in answers):
                break
        return answers

    def backends(self) -> Iterator[Yield]:
        """Train on each other backend that runs here."""
        assert self.whole is not None
        places = registered_backends()
        names = {places[name]: name for name in sorted(set(places) & self._request.targets, reverse=True)}
        for name in sorted(names.values()):
            if places[name] == places[FALLBACK]:
                continue
            try:
                how: OnCPU = getattr(get_backend_class(name), "on_cpu", OnCPU())
            except XTrainError as error:
                yield Skipped(f"agreement: {name}", " ".join(str(error).split()))
                continue
            told = _Told("XT-AGREE-01", name, f"on {name}", how.told_by)
            yield from self._compared(told, self._trained(self._on(name, how)), PRECISIONS[WHOLE])

    def _on(self, name: str, how: OnCPU) -> Training:
        assert self.whole is not None
        options = {"backend": name, "backend_options": dict(how.options) or None}
        return self._make(source=self.whole.draws, variables=how.variables, options=options)

    def processes(self) -> Iterator[Yield]:
        """Train on two processes, each with half of every batch."""
        assert self.whole is not None
        parts, told = halved(self._batches), _Told("XT-AGREE-03", PROCESSES, "on two processes")
        if isinstance(parts, str):
            yield Skipped(f"agreement: {PROCESSES}", parts)
            return
        make = partial(Training, steps=self._request.steps, source=self.whole.draws)
        trainings = on_two(make, parts, self._request.subject)
        answers = self._trained(*trainings)
        if any(isinstance(answer, Finding) for answer in answers):
            alone = self._trained(*(Training(reading(self._request.subject, part), 1) for part in parts))
            raised = next((a for a in alone if isinstance(a, Finding)), None)
            if raised is not None:
                yield Skipped(f"agreement: {PROCESSES}", f"a step with half of a batch ends: {raised.message}")
                return
        yield from self._compared(told, answers, PRECISIONS[WHOLE])

    # ---------------------------------------------------------------- comparison

    def _compared(self, told: _Told, answers: list[Answer], precision: Precision) -> Iterator[Yield]:
        refused = [answer for answer in answers if not isinstance(answer, Record)]
        if refused:
            first = min(refused, key=lambda answer: isinstance(answer, Refusal) and answer.kind == "lost")
            yield self._raised(told, first) if isinstance(first, Finding) else self._refused(told, first)
            return
        records = [answer for answer in answers if isinstance(answer, Record)]
        yield from self._judged(told, records, self._likeness(precision))

    def _judged(self, told: _Told, records: list[Record], likeness: Likeness) -> Iterator[Yield]:
        whole, other = self.whole, records[0]
        assert whole is not None
        name = f"agreement: {told.target}"
        if any(record.skipped for record in records):
            yield Skipped(name, f"a step is left out even with a loss scale of {_SCALES[-1]:.0f}: an overflow")
            return
        apart = next((d for r in records[1:] if (d := first_difference(other, r, Likeness())) is not None), None)
        found = apart or first_difference(whole, other, likeness)
        if found is not None:
            yield self._explained(told, found, records, apart is not None, likeness)
            return
        steps = comparable(whole, other)
        if steps:
            self.distances[told.target] = distance(whole, other)
        if steps < self._request.steps:
            why = other.parted[1] if other.parted else "the step draws other numbers of Python's or NumPy's generators"
            yield Skipped(name, f"after step {steps}: {why}")
        elif not judged(whole, likeness):
            yield Skipped(name, f"rounding alone changes more than {steps} steps of training move: nothing can be told")

    def _explained(
        self, told: _Told, found: Difference, records: list[Record], apart: bool, likeness: Likeness
    ) -> Yield:
        """Return the finding, or where another check has told it."""
        assert self.whole is not None
        several, calls = len(records) > 1, [record.calls for record in records]
        if several and not apart:
            own = [f"{n} normalises by the batch of its process (XT-MODULE-01)" for n in records[0].statistics]
            own += [f"the buffer {n} changes in a step (XT-MODULE-02)" for n in records[0].moved]
            if own:
                return Skipped(f"agreement: {told.target}", f"{own[0]}, so parameters differ")
        close = max(64 * likeness.unit, 1e-4)
        seen = [[call for call in part if call.step <= found.step] for part in (self.whole.calls, *calls)]
        parting = first_parting(seen[0], seen[1:], close) if all(calls) else None
        text = f"{told.where} the training is another one than on {FALLBACK} in {WHOLE}: {_where(found)}"
        place, fix, severity = place_of_layer(self._module, found.parameter.rpartition(".")[0]), "", None
        if apart:
            text = f"two processes go apart: {_where(found)}"
        elif several:
            severity = self._mild()
        if parting is not None:
            place, text = parting.place, f"{text}. {self._line(parting.way, several)}"
            fix = _FIXES[parting.way] if several else self._in_fp32(told)
            severity = "warning" if severity and parting.way == OTHER_LINES else severity
        elif several and self.whole.rates[found.step - 1] != records[0].rates[found.step - 1]:
            text, severity = f"{text}; the learning rate depends on the number of processes", "info"
        return Finding(told.id, text, fix, *place, told.target, severity)

    def _in_fp32(self, told: _Told) -> str:
        line = "with torch.autocast(self.device.type, enabled=False): this line, of numbers in fp32: x.float()"
        return line if told.target in PRECISIONS else ""

    def _mild(self) -> Severity:
        """Return the severity of what is right on one process, and may be meant so."""
        return "warning" if self._explicit or (self._request.devices or 1) > 1 else "info"

    def _line(self, way: str, several: bool) -> str:
        return f"This line is the first with another result{f': {_REASONS[way]}' if several else ''}"

    # ---------------------------------------------------------------- what does not train

    def _raised(self, told: _Told, raised: Finding) -> Yield:
        if told.elsewhere:
            return Skipped(f"agreement: {told.target}", f"the training ends with an error there ({told.elsewhere})")
        text = f"{told.where} this ends the training, and on {FALLBACK} in {WHOLE} it does not: {raised.message}"
        severity: Severity = "error" if self._explicit or told.target == PROCESSES else "warning"
        return Finding(told.id, text, raised.fix, raised.file, raised.line, told.target, severity)

    def _refused(self, told: _Told, refusal: Refusal) -> Yield:
        name = f"agreement: {told.target}"
        if refusal.kind in ("missing", "lost"):
            return Skipped(name, refusal.text)
        if refusal.kind == "protocol" and is_told(refusal.text, self._request):
            return Skipped(name, "the training is refused there: XT-PROTOCOL-02 to 04")
        place = refusal.place if refusal.place.line else place_of_method(self._module, "configure_optimizers")
        if told.target == PROCESSES:
            return Finding(told.id, f"two processes go apart: {refusal.text}", refusal.fix, *place, told.target)
        text = f"{told.where} xtrain refuses this training: {refusal.text}"
        severity: Severity = "error" if self._explicit else "info"
        return Finding("XT-AGREE-04", text, refusal.fix, *place, told.target, severity)


def _where(found: Difference) -> str:
    owner = f", {found.optimizer}" if found.optimizer != NOBODYS else ""
    return f"first in step {found.step}{owner}: {found.text}"
