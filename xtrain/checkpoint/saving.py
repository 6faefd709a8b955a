"""Writes the state of a run as a checkpoint: all ranks together, at once or in the background."""

from __future__ import annotations

import json
import threading
import time
import warnings
from typing import Any

from xtrain.checkpoint.digests import Facts
from xtrain.checkpoint.format import Draft, write_section
from xtrain.checkpoint.parts import PREFIX, Splitter
from xtrain.checkpoint.places import Place, place
from xtrain.checkpoint.plain import check_readable
from xtrain.checkpoint.state import collect, summary_of
from xtrain.checkpoint.stores import store_of
from xtrain.collectives import Collectives
from xtrain.errors import CheckpointError, explain
from xtrain.run.state import Run

_PATIENCE, _HURRY = 1800.0, 10.0  # seconds that rank 0 waits for the others' files in the background
Sections = dict[str, Any]


def save(run: Run, path: Place, weights_only: bool = False) -> Place:
    """Write a checkpoint; all ranks call it, and it is complete when it returns.

    Args:
        run: between two training steps.
        path: the folder to make; the same on every rank.
        weights_only: leave out what only a training needs.

    Raises:
        CheckpointError: on every rank, if one cannot write its part; nothing is left of it then.
    """
    writing = Writing(run, path, weights_only)
    writing.write()
    return writing.finish()


class Writing:
    """A checkpoint whose state was collected, and that is to be written.

    Args:
        run: between two training steps.
        path: the folder to make; the same on every rank.
        weights_only: leave out what only a training needs.
        facts: more to say in the summary.
        background: it will be written while the training goes on.

    Attributes:
        path: the folder.
        limit: until when rank 0 waits for the other ranks in the background, by the monotonic clock.
    """

    _draft: Draft | None = None

    def __init__(
        self,
        run: Run,
        path: Place,
        weights_only: bool = False,
        facts: dict[str, Any] | None = None,
        background: bool = False,
    ) -> None:
        self.path = path
        self._ranks: Collectives = run.backend.collectives
        self._sections: Sections = {}
        self._summary: dict[str, Any] = {}
        problem = ""
        try:
            checkpoint, own = collect(run, weights_only, background)
            self._sections, self._summary = _sections(run, checkpoint, own)
            self._summary |= facts or {}
            for name, content in self._sections.items():
                check_readable(content, name)
        except CheckpointError as error:
            problem = str(error)
        self._agree(problem)
        self._folder = place(self._begin())
        self._facts: dict[str, Facts] = {}
        self._problem = ""
        self.limit = time.monotonic() + _PATIENCE

    def _agree(self, problem: str) -> None:
        """Raise on every rank what one of them found."""
        found = next((text for text in gathered(problem, self._ranks) if text), "")
        if found:
            raise CheckpointError(found)

    def _begin(self) -> str:
        """Let rank 0 make the folder, and return where it is."""
        problem, folder = "", ""
        if self._ranks.rank == 0:
            try:
                self._draft = Draft(self.path)
                folder = str(self._draft.folder)
            except (OSError, CheckpointError) as error:
                problem = told(self.path, error)
        problem, folder = self._ranks.broadcast((problem, folder))
        if problem:
            raise CheckpointError(problem)
        return folder

    def write(self) -> None:
        """Write this rank's files; what goes wrong is told by `finish`."""
        try:
            for name in list(self._sections):
                self._facts[name] = write_section(self._folder, name, self._sections.pop(name))
        except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError when the disk is full
            self._problem = told(self.path, error)

    def finish(self) -> Place:
        """Wait for the other ranks, and make the checkpoint visible."""
        parts = gathered((self._problem, self._facts), self._ranks)
        problem = next((text for text, _ in parts if text), "")
        if not problem and self._draft is not None:
            problem = self._complete(self._draft, [facts for _, facts in parts])
        problem = self._ranks.broadcast(problem)
        if problem:
            if self._draft is not None:
                self._draft.abandon()
            raise CheckpointError(problem)
        return self.path

    def _complete(self, draft: Draft, parts: list[dict[str, Facts]]) -> str:
        """Write the manifest, and return what goes wrong."""
        draft.files = {name: facts for part in parts for name, facts in part.items()}
        there = store_of(draft.folder).sizes(draft.folder, draft.files)
        missing = [name for name in draft.files if name not in there]
        if missing:
            fix = "a folder that every process writes to: ModelCheckpoint(dirpath='/shared/run')"
            return explain("the files of all ranks in one folder", f"{draft.folder} without {missing[0]}", fix)
        try:
            draft.finish(self._summary)
        except (OSError, CheckpointError) as error:
            return told(self.path, error)
        return ""

    def write_alone(self) -> str:
        """Write and finish without collectives: the ranks tell each other by files. Returns what went wrong."""
        self.write()
        rank, count = self._ranks.rank, self._ranks.world_size
        if count > 1:
            note = json.dumps([self._problem, self._facts])
            store_of(self._folder).write_text(self._folder / f"part-{rank:05d}.json", note)
        if self._draft is None:
            return self._problem
        parts = [(self._problem, self._facts)] if count == 1 else self._await_notes(count)
        problem = next((text for text, _ in parts if text), "") or self._complete(self._draft, [f for _, f in parts])
        if problem:
            self._draft.abandon()
        return problem

    def _await_notes(self, count: int) -> list[tuple[str, dict[str, Facts]]]:
        notes = [self._folder / f"part-{rank:05d}.json" for rank in range(count)]
        parts: list[tuple[str, dict[str, Facts]]] = []
        while len(parts) < count:
            note = _read_note(notes[len(parts)])
            if note is not None:
                parts.append(note)
            elif time.monotonic() > self.limit:
                received = f"none of {notes[len(parts)].stem}, which may have ended"
                return [(explain("the files of all ranks", received), {})]
            else:
                time.sleep(store_of(self._folder).pause)
        for note_file in notes:
            note_file.unlink()
        return parts


def _read_note(note: Place) -> tuple[str, dict[str, Facts]] | None:
    """Return what a rank has written; None before it is there, in some file systems a part at a time."""
    try:
        problem, facts = json.loads(note.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return problem, facts


class Background(threading.Thread):
    """Writes a checkpoint while the training goes on.

    Attributes:
        problem: what went wrong, empty until something does.
    """

    def __init__(self, writing: Writing) -> None:
        super().__init__(name="xtrain-checkpoint")
        self._writing = writing
        self.problem, self._told = "", False
        self.start()

    def run(self) -> None:
        """Write; an error is kept for the training's thread to tell."""
        try:
            self.problem = self._writing.write_alone()
        except Exception as error:  # whatever it is, it must not get lost with the thread
            self.problem = told(self._writing.path, error)

    def tell(self) -> None:
        """Warn of what went wrong, once."""
        if self.problem and not self._told:
            self._told = True
            warnings.warn(f"The training goes on without this checkpoint. {self.problem}", stacklevel=3)

    def hurry(self) -> None:
        """Wait no longer than a moment for the files of other ranks."""
        self._writing.limit = min(self._writing.limit, time.monotonic() + _HURRY)


def _sections(run: Run, checkpoint: dict[str, Any], own: dict[str, Any]) -> tuple[Sections, dict[str, Any]]:
    """Return the files that this rank writes, by name, and the summary of the manifest."""
    rank, splitter = run.trainer.global_rank, Splitter()
    summary = {} if rank else summary_of(run, checkpoint)
    states = checkpoint.pop("optimizer_states")
    sections: Sections = {"module.pt": splitter.split(checkpoint.pop("state_dict"), "module.pt")}
    for number, (label, state) in enumerate(states.items()):
        name = f"optimizer-{number}.pt"
        sections[name] = splitter.split({"name": label, **state}, name)
    sections["training.pt"] = checkpoint
    sections = {} if rank else sections
    if splitter.shard:
        sections[f"{PREFIX}{rank:05d}.pt"] = splitter.shard
    if own:
        sections[f"rank-{rank:05d}.pt"] = own
    return sections, summary


def gathered(value: Any, ranks: Collectives) -> list[Any]:
    """Return what each rank passed, in order of rank; everything is small."""
    return [ranks.broadcast(value, rank) for rank in range(ranks.world_size)]


def told(path: Place, error: Exception) -> str:
    """Return the message for a disk that is full, a folder that is read-only, and the like."""
    if isinstance(error, CheckpointError):
        return str(error)
    received = f"{type(error).__name__}: {error}"
    return explain(
        f"to write {path}", received, "free space on that disk, or another dirpath; the last checkpoint is whole"
    )
