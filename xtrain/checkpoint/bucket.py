"""Checkpoints in a file system of fsspec, such as an object store, which has neither moves nor locks.

Sections are written to where they stay, the manifest after all of them: a folder without one is incomplete, and nobody
picks it. While it is written it has a file ``owner``, by which the leftovers of a save that died are known.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import torch

from xtrain.checkpoint.digests import Digesting, Facts, without_crc32
from xtrain.checkpoint.places import MANIFEST, SUFFIX, Remote, foreign_folder
from xtrain.errors import CheckpointError, explain

_OWNER = "owner"
_HOLDER = ".lock"
_held: dict[str, tuple[str, object, int]] = {}  # by folder: what we wrote there, for whom, how often


class Bucket:
    """See `xtrain.checkpoint.stores.Store`."""

    pause = 0.5

    def begin(self, target: Remote) -> Remote:
        """Delete what `target` was, and mark it as being written."""
        _check_holder(target.parent)
        found = self.sizes(target)
        if found and MANIFEST not in found and _OWNER not in found:
            raise foreign_folder(target)
        self.remove(target)
        target.mkdir()
        (target / _OWNER).write_text(_me())
        return target

    def save(self, folder: Remote, name: str, content: Any) -> Facts:
        """Write one section, and compute its checksums on the way."""
        with (folder / name).open("wb") as file, without_crc32():
            digests = Digesting(file)
            torch.save(content, cast("IO[bytes]", digests))
        return digests.facts()

    def publish(self, folder: Remote, target: Remote, manifest: str) -> None:
        """Write the manifest."""
        _check_holder(folder.parent)
        (folder / MANIFEST).write_text(manifest)
        (folder / _OWNER).unlink(missing_ok=True)

    def abandon(self, folder: Remote) -> None:
        """Remove what was written."""
        with suppress(OSError):
            self.remove(folder)

    def write_text(self, path: Remote, text: str) -> None:
        """Write a small file: it is there when it is whole."""
        path.write_text(text)

    def sizes(self, folder: Remote, names: Iterable[str] | None = None) -> dict[str, int]:
        """Return bytes by name, of all: that is one question."""
        try:
            return folder.sizes()
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def copies(self, folder: Remote) -> Callable[[Iterable[str]], Path]:
        """Return what downloads files, once; they are deleted with what was returned. Mapped ones stay readable."""
        return _Copies(folder)

    def taken(self, path: Remote) -> bool:
        """Return whether anything but a save that died has that name."""
        found = self.sizes(path)
        return MANIFEST in found or (bool(found) and _OWNER not in found)

    def remove(self, path: Remote) -> None:
        """Delete the manifest, then the rest."""
        (path / MANIFEST).unlink(missing_ok=True)
        with suppress(FileNotFoundError), path.asked() as (system, inner):
            system.rm(inner, recursive=True)

    def link(self, link: Remote, target: Remote) -> None:
        """Copy the files of `target` within the file system, the manifest last."""
        self.remove(link)
        link.mkdir()
        (link / _OWNER).write_text(_me())
        names = sorted(self.sizes(target), key=lambda name: name == MANIFEST)
        with target.asked() as (system, inner), link.asked() as (_, other):
            for name in names:
                system.cp_file(f"{inner}/{name}", f"{other}/{name}")
        (link / _OWNER).unlink(missing_ok=True)

    def hold(self, folder: Remote, owner: object) -> _Claim:
        """Write down who writes to the folder from now on: a run that did so before is told when it saves next."""
        token, known, count = _held.get(str(folder), ("", owner, 0))
        if not count or known is not owner:
            token, count = _me(), 0
            try:
                folder.mkdir()
                (folder / _HOLDER).write_text(token)
                self._remove_leftovers(folder)
            except OSError as error:
                fix = "ModelCheckpoint(dirpath='...') that can be written to"
                raise CheckpointError(
                    explain(f"to write to {folder}", f"{type(error).__name__}: {error}", fix)
                ) from error
        _held[str(folder)] = token, owner, count + 1
        return _Claim(folder, token)

    def _remove_leftovers(self, folder: Remote) -> None:
        for name in self.sizes(folder):
            inside = self.sizes(folder / name) if name.endswith(SUFFIX) else {}
            if _OWNER in inside and MANIFEST not in inside:
                self.remove(folder / name)


class _Claim:
    """A folder that a run has written its name to."""

    def __init__(self, folder: Remote, token: str) -> None:
        self._folder, self._token = folder, token

    def release(self) -> None:
        """Take the name away, after the last callback of the run."""
        token, owner, count = _held.get(str(self._folder), ("", None, 0))
        if token != self._token:
            return
        if count > 1:
            _held[str(self._folder)] = token, owner, count - 1
            return
        del _held[str(self._folder)]
        with suppress(OSError):
            if _holder(self._folder) == token:
                (self._folder / _HOLDER).unlink(missing_ok=True)


class _Copies:
    """Downloads the files of a checkpoint to a folder that lives as long as this."""

    def __init__(self, folder: Remote) -> None:
        self._folder, self._here = folder, Path(tempfile.mkdtemp(prefix="xtrain-"))
        weakref.finalize(self, shutil.rmtree, self._here, ignore_errors=True)

    def __call__(self, names: Iterable[str]) -> Path:
        for name in names:
            if not (self._here / name).exists():
                with self._folder.asked() as (system, inner):
                    system.get_file(f"{inner}/{name}", str(self._here / f".{name}"))
                (self._here / f".{name}").rename(self._here / name)
        return self._here


def _me() -> str:
    return f"process {os.getpid()} of {socket.gethostname()}, {secrets.token_hex(4)}"


def _holder(folder: Remote) -> str:
    try:
        return (folder / _HOLDER).read_text()
    except FileNotFoundError:
        return ""


def _check_holder(folder: Remote) -> None:
    """Refuse to write where another run has begun since this one did."""
    token = _held.get(str(folder), ("", None, 0))[0]
    found = _holder(folder) if token else ""
    if found != token:
        fix = "ModelCheckpoint(dirpath='another folder'), or end that process first"
        received = f"another one that began later, {found.partition(',')[0] or 'which has ended since'}"
        raise CheckpointError(explain(f"{folder} to be written to by one run", received, fix))
