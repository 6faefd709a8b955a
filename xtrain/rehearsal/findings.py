"""What a rehearsal comes to: findings, what was not looked at, figures; as JSON it is schema 1, which is frozen."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

SCHEMA = 1
SEVERITIES = ("error", "warning", "info")
Severity: TypeAlias = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """Something that will go wrong, or that is worth knowing.

    Attributes:
        id: of the check's `ids`, ``"XT-KIND-01"``.
        message: what is wrong, in a sentence or two.
        fix: the corrected line of the user's code.
        file: the user's file, absolute; None if there is no place for it.
        line: in that file, from 1.
        target: where it goes wrong: a backend, a precision, or ``"processes"``.
        severity: only where it differs from that of the id.
    """

    id: str
    message: str
    fix: str = ""
    file: str | None = None
    line: int | None = None
    target: str = "all"
    severity: Severity | None = None


@dataclass(frozen=True)
class Skipped:
    """Something that was not looked at.

    Attributes:
        check: its name, or a part of it, ``"graphs"``.
        reason: why, with the line that would change it (``pip install ...``).
    """

    check: str
    reason: str


@dataclass(frozen=True)
class Figure:
    """A number, or several, that people and tools may want.

    Attributes:
        name: its key in ``figures``, with a dot after the name of the check: ``"data.batch"``.
        value: anything JSON has.
    """

    name: str
    value: Any


@dataclass(frozen=True)
class Blocked:
    """What a check yields when the training step does not run: checks that run steps are skipped then.

    Attributes:
        reason: why, ``"training_step is refused (XT-PROTOCOL-01)"``.
    """

    reason: str


@dataclass
class Report:
    """All of a rehearsal.

    Attributes:
        module: what was rehearsed, as the user named it.
        findings: sorted by severity, then by place.
        skipped: what was not looked at.
        figures: by name.
        failed: names of checks that could not run by a fault of their own; they are among `skipped`.
        seconds: how long it took.
    """

    module: str
    findings: list[Finding] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def status(self) -> int:
        """The exit status: 0 without errors, 1 with errors, 2 if a check itself could not run."""
        if self.failed:
            return 2
        return int(any(finding.severity == "error" for finding in self.findings))

    def as_dict(self) -> dict[str, Any]:
        """Return the object that ``--json`` prints."""
        keys = ("id", "severity", "target", "file", "line", "message", "fix")
        found = [{key: asdict(finding)[key] for key in keys} for finding in self.findings]
        left = [asdict(skipped) for skipped in self.skipped]
        return {"schema": SCHEMA, "module": self.module, "findings": found, "skipped": left, "figures": self.figures}

    def as_json(self) -> str:
        """Return that object as text."""
        return json.dumps(self.as_dict(), indent=2)

    def __str__(self) -> str:
        from xtrain.rehearsal.screen import screen

        return screen(self)
