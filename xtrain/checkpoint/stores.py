"""What differs between a disk and an object store, in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from xtrain.checkpoint.bucket import Bucket
from xtrain.checkpoint.digests import Facts
from xtrain.checkpoint.disk import Disk
from xtrain.checkpoint.places import Place


class Hold(Protocol):
    """A folder of checkpoints that one run writes to."""

    def release(self) -> None:
        """Let other runs write there."""


class Store(Protocol):
    """Keeps checkpoints, each of them a folder that somebody finds whole or not at all.

    Attributes:
        pause: seconds between two looks for a file that another process writes.
    """

    pause: float

    def begin(self, target: Any) -> Any:
        """Return the folder to write the sections of the checkpoint `target` to.

        Raises:
            CheckpointError: if what is there is no checkpoint, and would be lost.
        """

    def save(self, folder: Any, name: str, content: Any) -> Facts:
        """Write one section, by `torch.save`; returns its size and checksums."""

    def publish(self, folder: Any, target: Any, manifest: str) -> None:
        """Make a checkpoint visible whose sections are written, in place of one of the same name."""

    def abandon(self, folder: Any) -> None:
        """Remove what was written since `begin`."""

    def write_text(self, path: Any, text: str) -> None:
        """Write a small file, whole or not at all."""

    def sizes(self, folder: Any, names: Iterable[str] | None = None) -> dict[str, int]:
        """Return what lies in a folder, or of that at least `names`: bytes by name; nothing if there is none."""

    def copies(self, folder: Any) -> Callable[[Iterable[str]], Path]:
        """Return what brings files of a checkpoint, by name, to a folder of this machine, which it returns."""

    def taken(self, path: Any) -> bool:
        """Return whether a name is in use."""

    def remove(self, path: Any) -> None:
        """Delete a checkpoint: it loses its name, or its manifest, first."""

    def link(self, link: Any, target: Any) -> None:
        """Let a second name stand for the checkpoint `target`."""

    def hold(self, folder: Any, owner: object) -> Hold:
        """Take a folder for a run, and make sure that it can be written to.

        Args:
            folder: of checkpoints.
            owner: the run's Trainer; several callbacks of one may hold the same folder.

        Raises:
            CheckpointError: if another run writes there, or nobody can.
        """


_DISK, _BUCKET = Disk(), Bucket()


def store_of(path: Place) -> Store:
    """Return what keeps checkpoints at `path`."""
    return _DISK if isinstance(path, Path) else _BUCKET
