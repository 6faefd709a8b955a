"""The check ``graphs`` of ``xtrain check``: what a training step costs on a TPU, by the real torch_xla on the CPU."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import ClassVar

import torch
from torch.utils.data import DataLoader, IterableDataset

from xtrain.errors import BackendUnavailableError
from xtrain.rehearsal.check import Check, Needs, Request, Yield
from xtrain.rehearsal.findings import Figure, Finding, Severity, Skipped
from xtrain.rehearsal.places import Place, place_of_error, place_of_loader
from xtrain.rehearsal.subject import Subject

from .runtime import Runtime
from .traced import Cause, Read, TooSlowError, TracedStep, Watch, cause

_TPU = "tpu"
_IMPORTED_IN = os.getpid()  # a fork, which has what is in memory, has another one
_LEAST_STEPS = 12
_WARM_UP = 2  # the state of the optimizers appears in the first step
_EPOCH = 5  # full batches before the last one of a long epoch
_ENOUGH, _MOST = 35.0, 80.0  # seconds: no further step, and none at all
_SMALLER = 'a smaller model, or fewer rows (--batch "4x3x32x32")'
# A TPU has them, the CPU that stands for it has not.
_ON_TPU = ("aten::upsample_nearest2d", "aten::upsample_bilinear2d")
_INSTEAD = {
    "nonzero": "torch.where(mask, a, b) or x * mask, which keep the shape",
    "_unique2": "torch.nn.functional.one_hot(x, classes).amax(0), which keeps the shape",
    "bincount": "torch.nn.functional.one_hot(x, classes).sum(0)",
    "multinomial": "(logits - torch.empty_like(logits).exponential_().log()).argmax(-1)",
    "logaddexp": "torch.logsumexp(torch.stack([a, b]), 0)",
    "hypot": "(a * a + b * b).sqrt()",
    "vdot": "(a * b).sum()",
    "nansum": "torch.where(x.isnan(), 0, x).sum()",
    "im2col": "x.unfold(2, size, step).unfold(3, size, step)",
    "repeat_interleave": "x.repeat_interleave(2, dim=0), with a number, or x[index]",
    "median": "torch.sort(x)[0][len(x) // 2]",
}


class Graphs(Check):
    """Trains with torch_xla on the CPU, and counts compiles, executions and reads of each step."""

    name: ClassVar[str] = "graphs"
    ids: ClassVar[dict[str, Severity]] = {
        "XT-GRAPH-01": "warning",
        "XT-GRAPH-02": "warning",
        "XT-GRAPH-03": "warning",
        "XT-GRAPH-04": "warning",
        "XT-GRAPH-05": "error",
    }
    targets: ClassVar[tuple[str, ...]] = (_TPU, "xla")
    needs: ClassVar[Needs] = Needs(packages=("torch_xla",), pip="'xtrain-torch[tpu]'")
    seconds: ClassVar[float] = 110.0
    group: ClassVar[str] = "tpu"
    variables: ClassVar[dict[str, str]] = {"PJRT_DEVICE": "CPU"}

    def run(self, request: Request) -> Iterator[Yield]:
        """Train for some steps, of two epochs if there is a last batch to see."""
        from .backend import XLA

        reason = XLA.available()
        if reason is None and os.getpid() != _IMPORTED_IN and Runtime.in_use():
            reason = "this process uses torch_xla already: xtrain check FILE.py:NAME starts a fresh one"
        if reason is not None:
            yield Skipped(self.name, reason)
            return
        watch = Watch(_ENOUGH, _MOST)
        try:
            yield from _train(request, watch)
        except BackendUnavailableError as error:
            yield Skipped(self.name, str(error))
        except TooSlowError:
            text = f"{len(watch.steps)} training steps took more than {_MOST:.0f} s on this CPU"
            yield Skipped(self.name, f"{text}: {_SMALLER}")
        else:
            yield from _found(watch.steps, request.subject)
            if watch.ended_early:
                text = f"{_ENOUGH:.0f} s on this CPU were enough for {len(watch.steps)} training steps only"
                yield Skipped(f"{self.name}: what is compiled later", f"{text}: {_SMALLER}")


def _train(request: Request, watch: Watch) -> Iterator[Yield]:
    """Train; what only this backend does not take is yielded."""
    subject = _with_last_batch(request.subject)
    with _lines_of_backward(), watch.operations, watch.functions:
        try:
            subject.fit(subject.module(), max(request.steps, _LEAST_STEPS), [watch], backend=_TPU)
        except (BackendUnavailableError, EOFError):
            raise
        except Exception as error:
            place = place_of_error(error)
            if not place.line:
                raise
            message, _, fix = str(error).partition("\nFix:")
            text = f"this does not train on a TPU. {type(error).__name__}: {message.strip()}"
            yield Finding("XT-GRAPH-05", text, fix.strip(), *place, _TPU)


@contextmanager
def _lines_of_backward() -> Iterator[None]:
    """Let autograd keep the line of the forward for each operation of a backward."""
    before = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    torch.set_anomaly_enabled(True, False)
    try:
        yield
    finally:
        torch.set_anomaly_enabled(*before)


def _with_last_batch(subject: Subject) -> Subject:
    """Return `subject` with epochs that are so short that some steps see the last batch, if it is a smaller one."""
    loader = subject.data
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or not loader.batch_size:
        return subject
    rest = len(loader.dataset) % loader.batch_size  # type: ignore[arg-type]  # a dataset with indices has a length
    if loader.drop_last or not rest or len(loader) <= _EPOCH + 1 or loader.batch_sampler is None:
        return subject
    indices = [list(batch) for batch in islice(loader.batch_sampler, _EPOCH)]
    short = DataLoader(loader.dataset, batch_sampler=[*indices, indices[0][:rest]], collate_fn=loader.collate_fn)
    return replace(subject, data=short)


# ---------------------------------------------------------------- findings


def _found(steps: list[TracedStep], subject: Subject) -> Iterator[Yield]:
    later = steps[_WARM_UP:]
    yield Figure("graphs.steps", len(steps))
    yield Figure("graphs.compiles", sum(step.counts.compiles for step in steps))
    yield Figure("graphs.compiles_after_warm_up", sum(step.counts.compiles for step in later))
    if not later:
        return
    yield Figure("graphs.executions_per_step", sum(step.counts.executions for step in later) / len(later))
    yield Figure("graphs.reads_per_step", sum(step.counts.reads for step in later) / len(later))
    lacking = sum(count for step in later for read, count in step.reads.items() if _is_fallback(read))
    yield Figure("graphs.fallbacks_per_step", lacking / len(later))
    # What the host computes has the shape that comes out, and needs one finding only.
    computed = {read.place for step in steps for read in step.reads if _is_fallback(read)}
    yield from _compiled_again(steps, subject, computed)
    yield from _reads(later)


def _compiled_again(steps: list[TracedStep], subject: Subject, computed: set[Place]) -> Iterator[Finding]:
    """Yield one finding for each line that makes new graphs."""
    causes: dict[tuple[str, Place], list[Cause]] = {}
    for index, step in enumerate(steps):
        found = cause(steps, index) if index >= _WARM_UP and step.counts.compiles else None
        if found is not None and not (found.kind == "shape" and found.place in computed):
            causes.setdefault((found.kind, found.place), []).append(found)
    for (kind, place), several in causes.items():
        count, first = len(several), several[0]
        times = f"in {count} of {len(steps) - _WARM_UP} steps after the first {_WARM_UP}"
        change = f"{first.before} became {first.now}"
        if kind == "batch":
            yield _batches(several, times, change, _loader(subject))
        elif kind == "number":
            once = count == 1 and bool({first.before, first.now} & {"0", "1"})
            text = f"a Python number is a part of the graph here, and it changes ({change}): compiled again {times}"
            fix = "a tensor in place of the number: torch.tensor([value], device=self.device), or a number that stays"
            yield Finding("XT-GRAPH-02", text, fix, *place, _TPU, "info" if once else None)
        elif kind == "shape":
            text = f"shapes change here ({change}): compiled again {times}"
            fix = "one shape in every step: padding, or a mask, x * (torch.arange(n, device=x.device) < k)"
            yield Finding("XT-GRAPH-01", text, fix, *place, _TPU, "info" if count == 1 else None)
        elif kind == "order":
            text = "torch orders a backward through a backward (create_graph=True) in more than one way"
            yield Finding("XT-GRAPH-02", f"{text}: compiled again {times}", target=_TPU, severity="info")
        elif count > 2:
            text = f"the step goes another way from here on ({change}): compiled again {times}"
            fix = "as many operations in every step: for _ in range(longest), and torch.where for what is not wanted"
            yield Finding("XT-GRAPH-02", text, fix, *place, _TPU)


def _batches(several: list[Cause], times: str, change: str, place: Place) -> Finding:
    if len(several) > 2:
        text = f"batches of many shapes, each with a graph of its own ({change}): compiled {times}"
        fix = "a collate_fn that pads to one length, or to a few"
        return Finding("XT-GRAPH-01", text, fix, *place, _TPU)
    text = f"batches of another shape ({change}) have a graph of their own: compiled {times}, and not again"
    return Finding("XT-GRAPH-01", text, "DataLoader(..., drop_last=True)", *place, _TPU, "info")


def _loader(subject: Subject) -> Place:
    module = subject.module()
    return place_of_loader(subject.loader(module), module)


def _reads(steps: list[TracedStep]) -> Iterator[Finding]:
    """Yield operations that the host computes, then one finding for all lines that only ask."""
    total: Counter[Read] = sum((step.reads for step in steps), Counter())
    often = {read: count / len(steps) for read, count in total.items() if count > 1}
    for read, count in often.items():
        if _is_fallback(read):
            yield _fallback(read, count)
    asking = {read: count for read, count in often.items() if not read.operation and read.place.line}
    for direct in (True, False):
        here = {read.place: count for read, count in asking.items() if read.direct is direct}
        if here:
            yield _cut(here, direct, sum(step.counts.executions for step in steps) / len(steps))


def _is_fallback(read: Read) -> bool:
    return bool(read.operation) and not read.operation.startswith(_ON_TPU)


def _fallback(read: Read, count: float) -> Finding:
    name = read.operation.removeprefix("aten::").split(".")[0]
    text = f"XLA has no {name}: the host computes it, and the device waits ({count:.3g} times in a step)"
    fix = _INSTEAD.get(name, "operations that XLA has, or this one outside of training_step, once")
    return Finding("XT-GRAPH-04", text, fix, *read.place, _TPU, None if count >= 0.5 else "info")


def _cut(here: dict[Place, float], direct: bool, executions: float) -> Finding:
    place, *others = sorted(here, key=lambda place: -here[place])
    also = f"; so do the lines {', '.join(str(other.line) for other in others)}" if others else ""
    count = sum(here.values())
    text = f"the host reads a value in the middle of the step, so a step is {executions:.3g} graphs ({count:.3g} reads)"
    if not direct:
        text = f"what is called here reads values in the middle of the step, so a step is {executions:.3g} graphs"
    fix = "self.log(name, value), or torch.where(condition, a, b) in place of if" if direct else ""
    quiet = not direct or count < 0.5
    return Finding("XT-GRAPH-03", text + also, fix, *place, _TPU, "info" if quiet else None)
