"""The interface of a check: what it is called, what it may find, what it needs, and how it looks."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from xtrain.rehearsal.findings import Blocked, Figure, Finding, Severity, Skipped

if TYPE_CHECKING:
    from xtrain.rehearsal.subject import Subject

Yield: TypeAlias = Finding | Skipped | Figure | Blocked
PROCESSES = "processes"
"""The target of what goes wrong on several processes, whatever the backend."""


@dataclass(frozen=True)
class Needs:
    """What must be on this machine for a check to look.

    Attributes:
        packages: import names.
        pip: what to install for them, ``"'xtrain-torch[tpu]'"``.
        python: the least version.
        compiler: the name of a program, ``"g++"``.
    """

    packages: tuple[str, ...] = ()
    pip: str = ""
    python: tuple[int, int] = (3, 10)
    compiler: str = ""

    def missing(self) -> str | None:
        """Return what is not there, with the line that brings it, or None."""
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed: pip install {self.pip or package}"
        if sys.version_info < self.python:
            return f"it needs Python {'.'.join(map(str, self.python))} or later"
        if self.compiler and shutil.which(self.compiler) is None:
            return f"it needs {self.compiler}, which is not on the PATH"
        return None


@dataclass(frozen=True)
class Request:
    """What a check is asked.

    Attributes:
        subject: the user's module and data: makes them anew, and trains them.
        targets: backends, precisions and `PROCESSES` that the user asked about, or all.
        steps: how many training steps to run.
        devices: of the machine that it is meant for; None if the user did not say.
        memory: of each of these devices, in bytes; None if the user did not say.
    """

    subject: Subject
    targets: frozenset[str] = field(default_factory=frozenset)
    steps: int = 4
    devices: int | None = None
    memory: int | None = None

    @property
    def processes(self) -> int:
        """How many processes it is meant for; 2 stands for some where the user asked about several at all."""
        return self.devices or 2


class Check(ABC):
    """Looks at a user's module. An instance without arguments is made in a child process, which runs user code.

    Attributes:
        name: of the check, one word.
        ids: what it may find: a severity for each id. A finding may have a lower severity.
        targets: the check runs if the user asked for one of them; empty: it always runs.
        needs: what must be installed.
        seconds: its time limit, on two busy cores. It is stopped then, and that is a finding.
        group: checks of one group share a child, one after the other, and so the time of its imports. A check that
            patches torch, or needs variables, has a group of its own.
        variables: environment variables of the group's child.
        runs_steps: whether it calls ``training_step``: it is skipped if that does not run at all.
        first: all others wait for it (only `protocol`).

    Example:
        >>> from xtrain.rehearsal import Check, Finding
        >>> class Wide(Check):
        ...     name, ids, seconds = "wide", {"OUR-WIDE-01": "warning"}, 10.0
        ...     def run(self, request):
        ...         module = request.subject.module()
        ...         if sum(p.numel() for p in module.parameters()) > 10**9:
        ...             yield Finding("OUR-WIDE-01", "more parameters than our machine holds", "width=1024")
    """

    name: ClassVar[str]
    ids: ClassVar[Mapping[str, Severity]]
    targets: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[Needs] = Needs()
    seconds: ClassVar[float] = 40.0
    group: ClassVar[str] = "plain"
    variables: ClassVar[Mapping[str, str]] = {}
    runs_steps: ClassVar[bool] = True
    first: ClassVar[bool] = False

    @abstractmethod
    def run(self, request: Request) -> Iterable[Yield]:
        """Look, and yield what is found, as soon as it is known: what was yielded survives a crash.

        An exception with a line of the user's code in its traceback is a finding (XT-RUN-06); any other is a fault
        of the check, and the exit status is 2.
        """
