"""A rehearsal from its settings to its report: which checks run, in which children, and what they say."""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from xtrain.errors import XTrainError
from xtrain.precision import PRECISIONS
from xtrain.registry import get_backend_class, registered_backends
from xtrain.rehearsal.check import PROCESSES, Check
from xtrain.rehearsal.findings import SEVERITIES, Finding, Report, Skipped
from xtrain.rehearsal.groups import Group
from xtrain.rehearsal.incidents import IDS
from xtrain.rehearsal.registry import all_checks
from xtrain.rehearsal.subject import Source

_WAIT = 0.2  # seconds between two looks at children that say nothing


class RehearsalError(XTrainError, RuntimeError):
    """The module could not be rehearsed at all: it does not import, cannot be made, or has no data."""


@dataclass(frozen=True)
class Settings:
    """What the user asks.

    Attributes:
        targets: backends, precisions and ``"processes"``; empty: all of them.
        steps: training steps of a check.
        devices: of the machine that it is meant for.
        memory: of each of these devices, in bytes.
        ignore: ids of findings to leave out.
        checks: names of the checks to run; empty: all.
    """

    targets: tuple[str, ...] = ()
    steps: int = 4
    devices: int | None = None
    memory: int | None = None
    ignore: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()


@dataclass
class _Heard:
    """What children have said so far."""

    findings: list[Finding] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    blocked: str = ""


def rehearse(source: Source, settings: Settings | None = None, subject: Any = None) -> Report:
    """Run the checks and return what they found.

    Args:
        source: what to rehearse; imported in the children only.
        settings: what the user asks.
        subject: the `Subject` if it is in memory: children are forks of this process then.

    Raises:
        RehearsalError: if the module cannot be made; the message has the traceback of the user's code.
        UnknownBackendError: for a target that does not exist.
    """
    settings = settings or Settings()
    began = time.monotonic()
    targets = _targets(settings.targets)
    checks, heard = _chosen(settings, targets)
    # Aliases are looked up in the source of `_job`.
    groups = _groups(checks, _job(source, settings, targets), subject)
    try:
        _listen(groups, heard)
    finally:  # Ctrl-C, too
        for group in groups:
            group.remove()
    severities = {**IDS, **{id: severity for check in checks for id, severity in check.ids.items()}}
    found = [replace(f, severity=f.severity or severities[f.id]) for f in heard.findings if f.id not in settings.ignore]
    return Report(source.module, _sorted(found), heard.skipped, heard.figures, heard.failed, time.monotonic() - began)


def _targets(asked: Sequence[str]) -> frozenset[str]:
    """Return the targets by their names, of backends the one that the backend has for itself.

    Raises:
        UnknownBackendError: for one that does not exist.
    """
    known = {*PRECISIONS, PROCESSES}
    if not asked:
        return frozenset({*known, *registered_backends()})
    return frozenset(name if name in known else _name_of(name) for name in asked)


def _name_of(name: str) -> str:
    if name in registered_backends():  # not imported: its packages may be missing, which is told by the checks
        return name
    return get_backend_class(name).name


def _chosen(settings: Settings, targets: frozenset[str]) -> tuple[list[type[Check]], _Heard]:
    """Return the checks that can run, and why the others cannot."""
    heard, chosen = _Heard(), []
    found, unusable = all_checks()
    heard.skipped += unusable
    for check in found:
        if settings.checks and check.name not in settings.checks:
            continue
        if check.targets and not targets & set(check.targets):
            continue
        missing = check.needs.missing()
        if missing:
            heard.skipped.append(Skipped(check.name, missing))
        else:
            chosen.append(check)
    spoken_of = {target for check in found for target in check.targets}
    for target in settings.targets:
        if target not in spoken_of and target != PROCESSES:
            heard.skipped.append(Skipped(target, "no check is about it in particular"))
    return chosen, heard


def _job(source: Source, settings: Settings, targets: frozenset[str]) -> dict[str, Any]:
    given = {"steps": settings.steps, "devices": settings.devices, "memory": settings.memory}
    return {"source": asdict(source), "targets": sorted(targets), **given}


def _groups(checks: Sequence[type[Check]], job: dict[str, Any], subject: Any) -> list[Group]:
    by_name: dict[str, list[type[Check]]] = {}
    for check in checks:
        by_name.setdefault(check.group, []).append(check)
    threads = max(1, _cores() // 2)
    return [Group(members, job, threads, subject) for members in by_name.values()]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------- children


def _listen(groups: Sequence[Group], heard: _Heard) -> None:
    """Keep as many children as there are cores, until no check is left."""
    while any(group.left or group.running for group in groups):
        _drop_blocked(groups, heard)
        waits = any(group.blocks for group in groups)
        ready = [g for g in groups if g.left and not g.running and (g.blocks or not waits)]
        room = max(2, _cores()) - sum(group.running for group in groups)
        for group in ready[: max(room, 0)]:
            group.start()
        _wait(groups)
        for group in groups:
            for message in group.messages() if group.running else ():
                _hear(message, heard)


def _drop_blocked(groups: Sequence[Group], heard: _Heard) -> None:
    """Leave out the checks that run steps, if the step does not run."""
    for group in groups if heard.blocked else ():
        for name in [n for n, check in group.left.items() if check.runs_steps and n != group.current]:
            if not group.running:
                heard.skipped.append(Skipped(name, heard.blocked))
                group.left.pop(name)


def _wait(groups: Sequence[Group]) -> None:
    with selectors.DefaultSelector() as selector:
        for group in groups:
            if group.running:
                selector.register(group.pipe, selectors.EVENT_READ)
        if selector.get_map():
            selector.select(_WAIT)
    time.sleep(0.01)  # a pipe whose child is gone is always ready


def _hear(message: dict[str, Any], heard: _Heard) -> None:
    kind = message.pop("kind")
    if kind == "unusable":
        raise RehearsalError(message["text"])
    if kind == "finding":
        finding = Finding(**message)
        if finding not in heard.findings:
            heard.findings.append(finding)
    elif kind == "skipped":
        heard.skipped.append(Skipped(**message))
    elif kind == "figure":
        heard.figures[message["name"]] = message["value"]
    elif kind == "failed":
        heard.failed.append(message["check"])
        heard.skipped.append(Skipped(message["check"], f"it failed, by a fault of its own: {message['text']}"))
    elif kind == "blocked":
        heard.blocked = message["reason"]


def _sorted(findings: list[Finding]) -> list[Finding]:
    def order(finding: Finding) -> Iterator[Any]:
        yield SEVERITIES.index(finding.severity or "info")
        yield from (finding.file or "~", finding.line or 0, finding.id)

    return sorted(findings, key=lambda finding: tuple(order(finding)))
