"""Checkpoints in folders of this machine, or of a disk that several machines share.

A folder is written under a hidden name, brought to the disk, and renamed in one move. Locks die with their processes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from xtrain.checkpoint.digests import Facts, Following, without_crc32
from xtrain.checkpoint.locks import FolderHold, Lock, hold_folder
from xtrain.checkpoint.places import MANIFEST, foreign_folder

_DRAFT, _OWNER = ".tmp-", "owner"
_BRIEF = 60.0  # seconds


class Disk:
    """See `xtrain.checkpoint.stores.Store`."""

    pause = 0.02

    def begin(self, target: Path) -> Path:
        """Make a hidden folder beside `target`; the folder above is made if it is missing."""
        if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file():
            raise foreign_folder(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent)
        # The host, because process numbers repeat; the token, because two threads may save at once.
        name = f"{_DRAFT}{target.name}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        folder = target.parent / name
        folder.mkdir()
        Lock(folder / _OWNER).take()
        return folder

    def save(self, folder: Path, name: str, content: Any) -> Facts:
        """Write one file of a draft and bring it to the disk."""
        path = folder / name
        path.touch(exist_ok=False)
        with Following(path) as digests, without_crc32():
            try:
                torch.save(content, path)
            except RuntimeError as error:  # what torch's writer says when the disk is full tells nobody that it is
                free = shutil.disk_usage(folder).free
                raise OSError(f"{name} stopped at {path.stat().st_size:,} bytes; {free:,} are free there") from error
            _to_disk(path)
        return {"bytes": path.stat().st_size, "sha256": digests.found}

    def publish(self, folder: Path, target: Path, manifest: str) -> None:
        """Write the manifest and rename the folder; what was there before is replaced in the same move."""
        (folder / MANIFEST).write_text(manifest, encoding="utf-8")
        _to_disk(folder / MANIFEST)
        Lock(folder / _OWNER).release()
        (folder / _OWNER).unlink(missing_ok=True)
        _to_disk(folder)
        _move(folder, target)
        _to_disk(target.parent)

    def abandon(self, folder: Path) -> None:
        """Remove a draft."""
        Lock(folder / _OWNER).release()
        shutil.rmtree(folder, ignore_errors=True)

    def write_text(self, path: Path, text: str) -> None:
        """Write a draft of the file and rename it."""
        draft = path.with_name(f".{path.name}-{os.getpid()}")
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)

    def sizes(self, folder: Path, names: Iterable[str] | None = None) -> dict[str, int]:
        """Return bytes by name; of all that are no links, or of some, also while the folder is replaced."""
        if names is None:
            names = [p.name for p in folder.iterdir() if not p.is_symlink()] if folder.is_dir() else []
        found = {}
        for name in names:
            with suppress(FileNotFoundError, NotADirectoryError):
                found[name] = (folder / name).stat().st_size
        return found

    def copies(self, folder: Path) -> Callable[[Iterable[str]], Path]:
        """The files are here."""
        return lambda names: folder

    def taken(self, path: Path) -> bool:
        """Return whether anything has that name."""
        return os.path.lexists(path)

    def remove(self, path: Path) -> None:
        """Delete a checkpoint: it loses its name first, so that a crash leaves no torn one."""
        hidden = path.parent / f"{_DRAFT}dead-{path.name}-{secrets.token_hex(4)}"
        with suppress(FileNotFoundError):
            path.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)

    def link(self, link: Path, target: Path) -> None:
        """Let the symbolic link `link` point to `target`, in one move."""
        draft = link.with_name(f".{link.name}-{os.getpid()}")
        draft.unlink(missing_ok=True)
        draft.symlink_to(target.name)
        draft.replace(link)

    def hold(self, folder: Path, owner: object) -> FolderHold:
        """Take the lock of the folder; it is made if it is missing."""
        return hold_folder(folder, owner)


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
