"""Finds a checkpoint, and reads it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtrain.checkpoint.format import Checkpoint, checkpoints_in, is_checkpoint
from xtrain.checkpoint.lightning import read_lightning
from xtrain.checkpoint.parts import PREFIX, Assembler
from xtrain.errors import CheckpointError, explain
from xtrain.run.state import Run

logger = logging.getLogger("xtrain")


@dataclass
class Loaded:
    """A checkpoint that was read.

    Attributes:
        path: where.
        checkpoint: what is the same for all ranks.
        ranks: what each rank had of its own; empty if only weights were saved.
    """

    path: Path
    checkpoint: dict[str, Any]
    ranks: list[dict[str, Any]]


def read_checkpoint(path: Path, weights_only: bool | None = None) -> Loaded:
    """Read a checkpoint of xtrain, or one of Lightning 2.

    Args:
        path: a folder, or Lightning's file.
        weights_only: False lets a Lightning file run code, for one that holds objects. Never for a file of others.

    Raises:
        CheckpointError: if it is neither, or damaged.
    """
    if path.is_file():
        return Loaded(path, read_lightning(path, weights_only), [])
    if not is_checkpoint(path):
        inside = checkpoints_in(path)
        if not inside:
            Checkpoint(path)  # says what is wrong with it
        path = inside[0].path
    opened = Checkpoint(path)
    opened.verify()
    checkpoint = dict(opened.read("training.pt"))
    assemble = Assembler({name: opened.read(name) for name in sorted(opened.files) if name.startswith(PREFIX)})
    checkpoint["state_dict"] = assemble.dict(opened.read("module.pt"))
    sections = [opened.read(name) for name in sorted(opened.files, key=_number) if name.startswith("optimizer-")]
    for section in sections:
        section["state"], section["master"] = assemble.dict(section["state"]), assemble.dict(section["master"])
    checkpoint["optimizer_states"] = {section.pop("name"): section for section in sections}
    ranks = [opened.read(name) for name in sorted(opened.files) if name.startswith("rank-")]
    return Loaded(path, checkpoint, ranks)


def _number(name: str) -> int:
    digits = "".join(c for c in name if c.isdigit())
    return int(digits or 0)


def find(ckpt_path: str | os.PathLike[str], folders: Iterable[Path], best: Iterable[str]) -> Path | None:
    """Return the checkpoint that ``ckpt_path`` means; None if ``"last"`` finds none, and the run begins afresh.

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
        return Path(known[0])
    if ckpt_path != "last":
        return Path(ckpt_path)
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
        return candidate.path
    logger.info("ckpt_path='last': no checkpoint in %s; the training begins.", ", ".join(map(str, looked)))
    return None


Chooser = Callable[[], Path | None]


def agreed_path(choose: Chooser, run: Run) -> Path | None:
    """Let rank 0 choose a checkpoint for all; an error of its own is raised on all of them."""
    ranks, problem, chosen = run.backend.collectives, "", ""
    if ranks.rank == 0:
        try:
            chosen = str(choose() or "")
        except CheckpointError as error:
            problem = str(error)
    problem, chosen = ranks.broadcast((problem, chosen))
    if problem:
        raise CheckpointError(problem)
    return Path(chosen) if chosen else None
