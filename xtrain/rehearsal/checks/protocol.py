"""The life of a gradient in some steps of the user's module, watched on the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from xtrain.compat.backends import FALLBACK
from xtrain.errors import EDITED, NOTHING_TO_STEP, RAW_STEP, UNSEEN, ProtocolError, XTrainError
from xtrain.precision import PRECISIONS
from xtrain.registry import get_backend_class
from xtrain.rehearsal.check import PROCESSES, Check, Request, Yield
from xtrain.rehearsal.checks.gradients import GradientWatch
from xtrain.rehearsal.findings import Blocked, Finding, Severity
from xtrain.rehearsal.places import (
    NOWHERE,
    Place,
    current_place,
    place_of_error,
    place_of_method,
    place_of_optimizer,
)

_LOST = "a loss scale, and the average over processes"
_LEAST_STEPS = 12  # a critic that is trained five times as often is no mistake


class Protocol(Check):
    """Trains for some steps with every verb watched."""

    name: ClassVar[str] = "protocol"
    ids: ClassVar[dict[str, Severity]] = {
        "XT-PROTOCOL-01": "error",
        "XT-PROTOCOL-02": "error",
        "XT-PROTOCOL-03": "error",
        "XT-PROTOCOL-04": "error",
        "XT-PROTOCOL-05": "error",
        "XT-PROTOCOL-06": "warning",
        "XT-PROTOCOL-07": "error",
        "XT-PROTOCOL-08": "warning",
        "XT-PROTOCOL-09": "warning",
        "XT-PROTOCOL-10": "info",
        "XT-PROTOCOL-11": "error",
    }
    first: ClassVar[bool] = True

    def run(self, request: Request) -> Iterator[Yield]:
        """Train as one process in fp32, then as a run that would lose something by what only that allows."""
        watch, module = GradientWatch(), request.subject.module()
        try:
            with _told() as told:
                request.subject.fit(module, max(request.steps, _LEAST_STEPS), [watch])
        except XTrainError as error:
            yield _refused(error)
            yield Blocked(f"training is refused ({type(error).__name__})")
            return
        empty = {text: place for text, place in told if _is(text, NOTHING_TO_STEP)}
        for place in empty.values():
            yield Finding("XT-PROTOCOL-05", *_STEP_ON_NOTHING, *place)
        yield from _untrained(watch, module, "\n".join(empty))
        yield from watch.findings()
        yield from self._as_elsewhere(request)

    def _as_elsewhere(self, request: Request) -> Iterator[Yield]:
        """Train on a backend that believes to scale losses and to average gradients, without doing it."""
        asked = sorted(request.targets & {name for name in PRECISIONS if name.startswith("16")})
        target = asked[0] if asked else PROCESSES
        if not asked and PROCESSES not in request.targets and not request.devices:
            return
        base = get_backend_class(FALLBACK)
        backend = type("Elsewhere", (base,), {"unseen_gradient": lambda self: _LOST})()
        try:
            with _told():
                request.subject.fit(request.subject.module(), request.steps, backend=backend)
        except ProtocolError as error:
            yield _lost(error, target)


_STEP_ON_NOTHING = (
    "this optimizer steps, but no loss has reached its parameters: it trains nothing",
    "self.manual_backward(loss) before, of a loss that depends on these parameters (is one detached?)",
)


def _is(text: str, template: str) -> bool:
    return text.startswith(template.split("{")[0])


def _parts(error: BaseException) -> tuple[str, str]:
    message, _, fix = str(error).partition("\nFix:")
    return message.strip(), fix.strip()


def _refused(error: XTrainError) -> Finding:
    id = "XT-PROTOCOL-01" if isinstance(error, ProtocolError) else "XT-PROTOCOL-11"
    return Finding(id, *_parts(error), *place_of_error(error))


# What a message of the guard has in it, whatever its optimizer and backend.
_GUARDED = {
    "came from elsewhere": "XT-PROTOCOL-02",
    "a step of the raw": "XT-PROTOCOL-03",
    "were changed before": "XT-PROTOCOL-04",
}
assert all(part in text for part, text in zip(_GUARDED, (UNSEEN, RAW_STEP, EDITED), strict=True))


def is_told(text: str, request: Request) -> bool:
    """Return whether this check has told what a `ProtocolError` says that only one process in fp32 allows."""
    scaled = {name for name in PRECISIONS if name.startswith("16")}
    looked = request.targets & {*scaled, PROCESSES} or request.devices
    return bool(looked) and any(part in text for part in _GUARDED)


def _lost(error: ProtocolError, target: str) -> Finding:
    """Return the finding for what only one process in fp32 allows."""
    id = next((id for part, id in _GUARDED.items() if part in str(error)), "XT-PROTOCOL-01")
    return Finding(id, *_parts(error), *place_of_error(error), target)


def _untrained(watch: GradientWatch, module: Any, told: str) -> Iterator[Finding]:
    """Yield that nothing has stepped, or which optimizer has not, unless that was `told`."""
    idle = [optimizer for optimizer in watch.optimizers if id(optimizer) not in watch.stepped]
    if len(idle) == len(watch.optimizers) and not told:
        where = place_of_method(module, "training_step" if watch.optimizers else "configure_optimizers")
        text = f"no optimizer has stepped in {watch.batches} batches: nothing is trained"
        yield Finding("XT-PROTOCOL-07", text, "opt.zero_grad(); self.manual_backward(loss); opt.step()", *where)
        return
    for optimizer in idle:
        if watch.name_of(optimizer) not in told:
            text = f"{watch.name_of(optimizer)} has not stepped in {watch.batches} batches"
            fix = "opt.step() in training_step, or leave it out of configure_optimizers"
            yield Finding("XT-PROTOCOL-06", text, fix, *place_of_optimizer(optimizer, module))


@contextmanager
def _told() -> Iterator[list[tuple[str, Place]]]:
    """Keep the warnings that are given inside, each with the user's line that runs then."""
    told: list[tuple[str, Place]] = []

    def keep(message: Any, *_: Any, **__: Any) -> None:
        told.append((str(message), current_place() or NOWHERE))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = keep
        yield told
