"""Finds a checkpoint, and reads it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from xtrain.checkpoint.format import Checkpoint, checkpoints_in, is_checkpoint
from xtrain.checkpoint.lightning import read_lightning
from xtrain.checkpoint.parts import PREFIX, Assembler
from xtrain.checkpoint.places import Place, place
from xtrain.errors import CheckpointError, XTrainError, explain
from xtrain.run.state import Run

logger = logging.getLogger("xtrain")
Source = Checkpoint | Place
"""A checkpoint that was opened, or the place of a file of Lightning 2."""


@dataclass
class Loaded:
    """A checkpoint that was read.

    Attributes:
        path: where.
        checkpoint: what is the same for all ranks.
        ranks: what each rank had of its own; empty if only weights were saved.
    """

    path: Place
    checkpoint: dict[str, Any]
    ranks: list[dict[str, Any]]


def open_checkpoint(path: str | os.PathLike[str] | Place, verify: bool = True) -> Source:
    """Return a checkpoint of xtrain, opened, or the place of a file that may be one of Lightning 2.

    Args:
        path: a checkpoint, a folder with some, of which the newest is taken, or a file.
        verify: compare it with its checksums.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    where = place(path)
    if where.is_file():
        return where
    inside = [] if is_checkpoint(where) else checkpoints_in(where)
    opened = inside[0] if inside else Checkpoint(where)  # which says what is wrong with it
    if verify:
        opened.verify()
    return opened


def read_checkpoint(source: Source, weights_only: bool | None = None) -> Loaded:
    """Read what `open_checkpoint` returned.

    Args:
        source: the checkpoint, or Lightning's file.
        weights_only: False lets a Lightning file run code, for one that holds objects. Never for a file of others.

    Raises:
        CheckpointError: if it is neither, or damaged.
    """
    if not isinstance(source, Checkpoint):
        return Loaded(source, read_lightning(source, weights_only), [])
    checkpoint = dict(source.read("training.pt"))
    assemble = Assembler({name: source.read(name) for name in sorted(source.files) if name.startswith(PREFIX)})
    checkpoint["state_dict"] = assemble.dict(source.read("module.pt"))
    sections = [source.read(name) for name in sorted(source.files, key=_number) if name.startswith("optimizer-")]
    for section in sections:
        section["state"], section["master"] = assemble.dict(section["state"]), assemble.dict(section["master"])
    checkpoint["optimizer_states"] = {section.pop("name"): section for section in sections}
    ranks = [source.read(name) for name in sorted(source.files) if name.startswith("rank-")]
    return Loaded(source.path, checkpoint, ranks)


def _number(name: str) -> int:
    digits = "".join(c for c in name if c.isdigit())
    return int(digits or 0)


def find(ckpt_path: str | os.PathLike[str] | Place, folders: Iterable[Place], best: Iterable[str]) -> Source | None:
    """Return the checkpoint that ``ckpt_path`` means, verified; None if ``"last"`` finds none.

    Args:
        ckpt_path: ``"last"``, ``"best"`` or a path.
        folders: where ``"last"`` looks.
        best: the best ones that the Trainer's callbacks know.

    Raises:
        CheckpointError: if there is nothing that could be meant.
    """
    if ckpt_path == "best":
        known = [path for path in best if path]
        if not known:
            fix = "ModelCheckpoint(monitor='val_loss') among the callbacks, or ckpt_path='last'"
            raise CheckpointError(explain("a ModelCheckpoint that has saved a best checkpoint", "none", fix))
        return open_checkpoint(known[0])
    if ckpt_path != "last":
        return open_checkpoint(ckpt_path)
    looked = list(dict.fromkeys(folders))
    found = sorted((c for folder in looked for c in checkpoints_in(folder)), key=lambda c: c.created, reverse=True)
    for candidate in found:
        if candidate.summary.get("exception"):
            continue
        try:
            candidate.verify()
        except (CheckpointError, OSError) as error:
            warnings.warn(f"{candidate.path} is passed over: {error}", stacklevel=2)
            continue
        return candidate
    logger.info("ckpt_path='last': no checkpoint in %s; the training begins.", ", ".join(map(str, looked)))
    return None


Chooser = Callable[[], Source | None]


def agreed(choose: Chooser, run: Run) -> Source | None:
    """Let rank 0 choose a checkpoint for all, and verify it; an error of its own is raised on all of them."""
    ranks, problem, source = run.backend.collectives, "", None
    if ranks.rank == 0:
        try:
            source = choose()
        except XTrainError as error:
            problem = str(error)
        except OSError as error:
            problem = explain("to read a checkpoint", f"{type(error).__name__}: {error}")
    path = str(source.path if isinstance(source, Checkpoint) else source or "")
    problem, path = ranks.broadcast((problem, path))
    if problem:
        raise CheckpointError(problem)
    return source if source is not None or not path else open_checkpoint(path, verify=False)
