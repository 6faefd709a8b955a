"""The folder that a checkpoint is: a manifest, and sections that `torch.load` reads without running code.

A folder is written under a hidden name, brought to the disk, and renamed in one move, so that whoever finds one
with a manifest finds a whole one. The manifest is written last and has size and sha256 of every other file.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.serialization import set_crc32_options

from xtrain.checkpoint.digests import Following, sha256_of
from xtrain.checkpoint.locks import Lock
from xtrain.checkpoint.plain import check_readable
from xtrain.errors import CheckpointError, explain

SCHEMA = 1
MANIFEST = "manifest.json"
SUFFIX = ".ckpt"
_DRAFT, _OWNER = ".tmp-", "owner"
_BRIEF = 60.0  # seconds
Facts = dict[str, Any]  # of one file: "bytes", and "sha256" of its blocks


class Draft:
    """A checkpoint that is being written.

    One process makes it, others may `join` it by its folder's name and write files of their own; the first one
    calls `finish` with what all of them wrote.

    Args:
        target: the folder it becomes; the folder above is made if it is missing.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent)
        # The host, because process numbers repeat; the token, because two threads may save at once.
        name = f"{_DRAFT}{target.name}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.folder = target.parent / name
        self.folder.mkdir()
        self._owner = Lock(self.folder / _OWNER)
        self._owner.take()
        self.files: dict[str, Facts] = {}

    def write(self, name: str, content: Any) -> None:
        """Write one section.

        Raises:
            CheckpointError: for content that could not be read back.
            OSError: if the disk is full or read-only.
        """
        self.files[name] = write_section(self.folder, name, content)

    def finish(self, summary: Mapping[str, Any]) -> Path:
        """Make the checkpoint visible, replacing one of the same name in the same move; returns its folder.

        Args:
            summary: what a person wants to know about it; plain values.
        """
        manifest = {
            "schema": SCHEMA,
            "created": time.time_ns(),
            "summary": dict(summary),
            "files": {name: self.files[name] for name in sorted(self.files)},
        }
        text = json.dumps(manifest | {"sha256": _digest_of(manifest)}, indent=2) + "\n"
        (self.folder / MANIFEST).write_text(text, encoding="utf-8")
        _to_disk(self.folder / MANIFEST)
        self._owner.release()
        (self.folder / _OWNER).unlink(missing_ok=True)
        _to_disk(self.folder)
        _move(self.folder, self.target)
        _to_disk(self.target.parent)
        return self.target

    def abandon(self) -> None:
        """Remove what was written."""
        self._owner.release()
        shutil.rmtree(self.folder, ignore_errors=True)


def write_section(folder: Path, name: str, content: Any) -> Facts:
    """Write one file of a draft and bring it to the disk; returns its size and sha256."""
    check_readable(content, name)
    path = folder / name
    path.touch(exist_ok=False)
    with Following(path) as digests, _without_crc32():
        torch.save(content, path)
        _to_disk(path)
    return {"bytes": path.stat().st_size, "sha256": digests.found}


_saves, _counting = 0, threading.Lock()


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Let `torch.save` leave out a checksum that nobody looks at when a file is read; that takes half of its time."""
    global _saves
    with _counting:
        _saves += 1
        set_crc32_options(False)
    try:
        yield
    finally:
        with _counting:
            _saves -= 1
            set_crc32_options(_saves == 0)


# -------------------------------------------------------------------- reading


class Checkpoint:
    """A finished checkpoint, opened: its manifest is read and its files are there in full length.

    Args:
        path: the folder.

    Attributes:
        path: the folder.
        summary: what a person wants to know about it.
        files: size and sha256 by name.
        created: nanoseconds since 1970.

    Raises:
        CheckpointError: if it is no checkpoint, an incomplete one, or of a schema that is not known here.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        manifest = _read_manifest(self.path)
        self.summary: dict[str, Any] = manifest["summary"]
        self.files: dict[str, Facts] = manifest["files"]
        self.created = int(manifest["created"])
        for name, facts in self.files.items():
            _check_size(self.path, name, int(facts["bytes"]))

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """Compare files with their checksums.

        Args:
            share: which of `shares` equal parts of the files this process reads.
            shares: 1 reads all of them.

        Raises:
            CheckpointError: naming the first file that is not what was written.
        """
        largest_first = sorted(self.files, key=lambda name: (-int(self.files[name]["bytes"]), name))
        names = largest_first[share::shares]
        for name, found in sha256_of(self.path, {name: int(self.files[name]["bytes"]) for name in names}).items():
            stated = self.files[name]["sha256"]
            if found != stated:
                block = next((i for i, (a, b) in enumerate(zip(found, stated, strict=False)) if a != b), 0)
                received = f"{self.path / name} with other bytes (sha256 {found[block][:12]}...)"
                expected = f"the file that was written (sha256 {stated[block][:12]}... of its block {block})"
                raise CheckpointError(explain(expected, received, _ANOTHER))

    def read(self, name: str) -> Any:
        """Return a section; its tensors are read from the file when they are first used.

        Raises:
            CheckpointError: if it is missing, or is not made of tensors and plain values.
        """
        if name not in self.files:
            raise CheckpointError(explain(f"a section {name}", f"{self.path} with {sorted(self.files)}", _ANOTHER))
        return load_file(self.path / name, mmap=True)


def load_file(path: Path, mmap: bool = False) -> Any:
    """Return what a file of `torch.save` holds, without running code from it.

    Raises:
        CheckpointError: if it holds more than tensors and plain values, or is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # pickle's, zipfile's, RuntimeError of torch's reader, KeyError, EOFError...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            explain("a file of tensors and plain values, as xtrain writes it", f"{path}: {reason}", _ANOTHER)
        ) from error


_ANOTHER = "another checkpoint: trainer.fit(model, ckpt_path='...')"


def is_checkpoint(path: Path) -> bool:
    """Return whether `path` looks like a finished checkpoint."""
    return path.is_dir() and not path.name.startswith(".") and (path / MANIFEST).is_file()


def checkpoints_in(folder: Path) -> list[Checkpoint]:
    """Return the complete checkpoints of `folder`, the newest first; damaged ones are left out."""
    found: list[Checkpoint] = []
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.suffix == SUFFIX and not path.is_symlink() and is_checkpoint(path):
                with suppress(CheckpointError, OSError):
                    found.append(Checkpoint(path))
    return sorted(found, key=lambda c: c.created, reverse=True)


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        what = "a file" if path.exists() else "nothing there"
        raise CheckpointError(explain("a checkpoint, which is a folder", f"{path}: {what}", _ANOTHER))
    if not (path / MANIFEST).is_file():
        raise CheckpointError(explain(f"a checkpoint with {MANIFEST}", f"{path} without one", _ANOTHER))
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        schema = manifest["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            explain(f"{MANIFEST} of a checkpoint", f"{path / MANIFEST}: {error}", _ANOTHER)
        ) from error
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        fix = "pip install -U xtrain-torch" if newer else _ANOTHER
        raise CheckpointError(explain(f"schema {SCHEMA}, which this xtrain reads", f"{path} of schema {schema!r}", fix))
    stated = manifest.pop("sha256", None)
    names = manifest.get("files")
    foreign = not isinstance(names, dict) or any(os.path.basename(n) != n for n in names)  # noqa: PTH119
    if foreign or stated != _digest_of(manifest):
        raise CheckpointError(
            explain(f"{MANIFEST} as it was written", f"{path / MANIFEST}, which was changed since", _ANOTHER)
        )
    return dict(manifest)


def _check_size(path: Path, name: str, size: int) -> None:
    file = path / name
    if not file.is_file():
        raise CheckpointError(explain(f"the file {name} in {path}", "a checkpoint without it", _ANOTHER))
    if file.stat().st_size != size:
        raise CheckpointError(explain(f"{file} of {size} bytes", f"{file.stat().st_size} bytes", _ANOTHER))


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


# -------------------------------------------------------------------- moves that leave no gap


def remove(path: Path) -> None:
    """Delete a checkpoint: it loses its name first, so that a crash leaves no torn one."""
    hidden = path.parent / f"{_DRAFT}dead-{path.name}-{secrets.token_hex(4)}"
    with suppress(FileNotFoundError):
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what saves of processes that died have left in `folder`."""
    for path in folder.glob(f"{_DRAFT}*"):
        with suppress(OSError):
            owner = path / _OWNER
            if owner.exists():
                dead = not Lock(owner).held_elsewhere()
            else:  # a save that is about to begin or to end, or one that was cut off there
                dead = path.name.startswith(f"{_DRAFT}dead-") or path.stat().st_mtime < time.time() - _BRIEF
            if dead:
                shutil.rmtree(path, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    """Rename the folder `source` to `target`; what was there before is deleted after it."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if not _exchange(source, target):  # without that call there is a moment without any
            aside = source.parent / f"{_DRAFT}dead-{target.name}-{secrets.token_hex(4)}"
            target.rename(aside)
            source.rename(target)
            source = aside
        if source.is_dir():
            shutil.rmtree(source, ignore_errors=True)
        else:
            source.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names of a folder change places in one move; False where the system cannot do that."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(call(here, os.fsencode(one), here, os.fsencode(other), swap) == 0)


def _to_disk(path: Path) -> None:
    """Wait until the file or folder `path` is on the disk."""
    with _descriptor(path) as number:
        os.fsync(number)


@contextmanager
def _descriptor(path: Path) -> Iterator[int]:
    number = os.open(path, os.O_RDONLY)
    try:
        yield number
    finally:
        os.close(number)
