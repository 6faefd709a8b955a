"""The folder that a checkpoint is: a manifest, and sections that `torch.load` reads without running code.

The manifest is written last and has size and sha256 of every other file, so that whoever finds one finds a whole
checkpoint; how that is kept where it lies is the business of `xtrain.checkpoint.stores`.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from xtrain.checkpoint.digests import Facts, sha256_of
from xtrain.checkpoint.places import MANIFEST, SUFFIX, Place, place
from xtrain.checkpoint.plain import check_readable
from xtrain.checkpoint.stores import store_of
from xtrain.errors import CheckpointError, explain

SCHEMA = 1


class Draft:
    """A checkpoint that is being written.

    One process makes it, others write sections of their own to its folder; the first one calls `finish` with what
    all of them wrote.

    Args:
        target: the folder it becomes; the folder above is made if it is missing.

    Attributes:
        folder: where its sections are written.
        files: what was written.

    Raises:
        CheckpointError: if `target` is a folder with other things in it.
    """

    def __init__(self, target: Place) -> None:
        self.target, self._store = target, store_of(target)
        self.folder: Place = self._store.begin(target)
        self.files: dict[str, Facts] = {}

    def write(self, name: str, content: Any) -> None:
        """Write one section.

        Raises:
            CheckpointError: for content that could not be read back.
            OSError: if the disk is full or read-only.
        """
        self.files[name] = write_section(self.folder, name, content)

    def finish(self, summary: Mapping[str, Any]) -> Place:
        """Make the checkpoint visible, replacing one of the same name; returns its folder.

        Args:
            summary: what a person wants to know about it; plain values.
        """
        manifest = {
            "schema": SCHEMA,
            "created": time.time_ns(),
            "summary": dict(summary),
            "files": {name: self.files[name] for name in sorted(self.files)},
        }
        text = json.dumps(manifest | {"sha256": digest_of(manifest)}, indent=2) + "\n"
        self._store.publish(self.folder, self.target, text)
        return self.target

    def abandon(self) -> None:
        """Remove what was written."""
        self._store.abandon(self.folder)


def write_section(folder: Place, name: str, content: Any) -> Facts:
    """Write one file of a draft and bring it to the disk; returns its size and sha256."""
    check_readable(content, name)
    return store_of(folder).save(folder, name, content)


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

    def __init__(self, path: str | os.PathLike[str] | Place) -> None:
        self.path = place(path)
        store = store_of(self.path)
        manifest = _read_manifest(self.path)
        self.summary: dict[str, Any] = manifest["summary"]
        self.files: dict[str, Facts] = manifest["files"]
        self.created = int(manifest["created"])
        sizes = store.sizes(self.path, self.files)
        for name, facts in self.files.items():
            _check_size(self.path, name, int(facts["bytes"]), sizes.get(name))
        self._copies = store.copies(self.path)

    def verify(self) -> None:
        """Compare all files with their checksums.

        Raises:
            CheckpointError: naming the first file that is not what was written.
        """
        sizes = {name: int(facts["bytes"]) for name, facts in self.files.items()}
        for name, found in sha256_of(self._copies(self.files), sizes).items():
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
        return load_file(self._copies([name]) / name, mmap=True)


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


def is_checkpoint(path: Place) -> bool:
    """Return whether `path` looks like a finished checkpoint."""
    return not path.name.startswith(".") and (path / MANIFEST).is_file()


def checkpoints_in(folder: str | os.PathLike[str] | Place) -> list[Checkpoint]:
    """Return the complete checkpoints of `folder`, the newest first; damaged ones are left out."""
    found: list[Checkpoint] = []
    where = place(folder)
    for name in sorted(store_of(where).sizes(where)):
        if name.endswith(SUFFIX) and is_checkpoint(where / name):
            with suppress(CheckpointError, OSError):
                found.append(Checkpoint(where / name))
    return sorted(found, key=lambda c: c.created, reverse=True)


def _read_manifest(path: Place) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        schema = manifest["schema"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _no_checkpoint(path) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(explain(f"{MANIFEST} of a checkpoint", f"{file}: {error}", _ANOTHER)) from error
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        fix = "pip install -U xtrain-torch" if newer else _ANOTHER
        raise CheckpointError(explain(f"schema {SCHEMA}, which this xtrain reads", f"{path} of schema {schema!r}", fix))
    stated = manifest.pop("sha256", None)
    if stated != digest_of(manifest) or not _well_formed(manifest):
        raise CheckpointError(explain(f"{MANIFEST} as it was written", f"{file}, which was changed since", _ANOTHER))
    return dict(manifest)


def _no_checkpoint(path: Place) -> CheckpointError:
    if path.is_dir():
        return CheckpointError(explain(f"a checkpoint with {MANIFEST}", f"{path} without one", _ANOTHER))
    what = "a file" if path.exists() else "nothing there"
    return CheckpointError(explain("a checkpoint, which is a folder", f"{path}: {what}", _ANOTHER))


def _well_formed(manifest: Mapping[str, Any]) -> bool:
    """Return whether a manifest has what is read from it, and names no file outside of its folder."""
    files = manifest.get("files")
    if not isinstance(files, dict) or not isinstance(manifest.get("summary"), dict):
        return False
    inside = all(os.path.basename(name) == name not in ("", ".", "..") for name in files)  # noqa: PTH119
    facts = [each if isinstance(each, dict) else {} for each in files.values()]
    numbers = [manifest.get("created"), *(each.get("bytes") for each in facts)]
    return inside and all(type(n) is int for n in numbers) and all(type(f.get("sha256")) is list for f in facts)


def _check_size(path: Place, name: str, size: int, found: int | None) -> None:
    if found is None:
        raise CheckpointError(explain(f"the file {name} in {path}", "a checkpoint without it", _ANOTHER))
    if found != size:
        raise CheckpointError(explain(f"{path / name} of {size} bytes", f"{found} bytes", _ANOTHER))


def digest_of(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of a manifest, which is its last entry: not a signature, but against accidents."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
