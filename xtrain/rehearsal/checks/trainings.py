"""Trainings that are compared: each in a copy of the process, with the same start, batches and random numbers."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from xtrain.errors import (
    BackendUnavailableError,
    ConfigurationError,
    MissingDependencyError,
    ProtocolError,
    RankFailedError,
    UnsupportedCombinationError,
    XTrainError,
)
from xtrain.rehearsal.checks.calls import Calls
from xtrain.rehearsal.checks.draws import Draw, Draws
from xtrain.rehearsal.checks.halves import reading
from xtrain.rehearsal.checks.moves import Record, Watch
from xtrain.rehearsal.copies import in_copies
from xtrain.rehearsal.findings import Finding
from xtrain.rehearsal.places import Place, place_of_error
from xtrain.rehearsal.subject import Subject

PATIENCE = 20.0
"""Seconds for which a process waits for the other one."""


@dataclass(frozen=True)
class Refusal:
    """What xtrain says in place of a training.

    Attributes:
        kind: ``"missing"``: it cannot run on this machine; ``"protocol"``, ``"rule"``: it refuses the module;
            ``"lost"``: another process has failed.
        text: of the error.
        fix: what it says to write.
        place: the user's line.
    """

    kind: str
    text: str
    fix: str
    place: Place


Answer = Record | Refusal | Finding


@dataclass(frozen=True)
class Training:
    """A way to train the subject.

    Attributes:
        subject: with its batches.
        steps: of the training.
        source: random numbers to be repeated; None for new ones.
        part: which half of each batch it has; None: all of it.
        lines: whether what the user's lines compute is noted.
        moved_by: relative, by which its parameters are moved in the beginning.
        seed: of that.
        variables: of the environment.
        options: of the Trainer.
    """

    subject: Subject
    steps: int
    source: Sequence[Draw] | None = None
    part: int | None = None
    lines: bool = False
    moved_by: float = 0.0
    seed: int = 0
    variables: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def run(self) -> Answer:
        """Train in this process."""
        os.environ.update(self.variables)
        draws, calls = Draws(self.source, self.part), Calls() if self.lines else None
        watch = Watch(draws, calls, self.moved_by, self.seed)
        try:
            module = self.subject.module()
            with draws, nullcontext() if calls is None else calls:
                self.subject.fit(module, self.steps, [watch], **self.options)
        except XTrainError as error:
            return _refusal(error)
        return watch.record


_KINDS: tuple[tuple[type[XTrainError], str], ...] = (
    (MissingDependencyError, "missing"),
    (BackendUnavailableError, "missing"),
    (RankFailedError, "lost"),
    (ProtocolError, "protocol"),
    (UnsupportedCombinationError, "rule"),
    (ConfigurationError, "rule"),
)


def _refusal(error: XTrainError) -> Refusal:
    kind = next((kind for cls, kind in _KINDS if isinstance(error, cls)), "missing")
    message, _, fix = str(error).partition("Fix:")
    return Refusal(kind, " ".join(message.split()), fix.strip().split("\n")[0], place_of_error(error))


def trained(*trainings: Training, seconds: float | None = None) -> list[Answer]:
    """Run `trainings` at the same time, each in a copy of this process, and return what they came to.

    Raises:
        RuntimeError: if a copy ended by an error that is not the user's.
        TimeoutError: if one did not answer within `seconds`.
    """
    return in_copies([training.run for training in trainings], seconds)


def on_two(make: Callable[..., Training], parts: Sequence[Sequence[Any]], subject: Subject) -> list[Training]:
    """Return the trainings of two processes, each of which has its half of the batches.

    Args:
        make: makes a `Training` from the keyword arguments that are different on the two.
        parts: the halves, see `xtrain.rehearsal.checks.halves.halved`.
        subject: the user's.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = {"devices": 2, "check_replicas": "off", "backend_options": {"timeout": PATIENCE}}
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        partial(make, part=rank, options=options, lines=True)(
            subject=reading(subject, part), variables={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank, part in enumerate(parts)
    ]
