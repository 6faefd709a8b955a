"""Where checkpoints lie: paths of this machine, and URLs of the file systems that fsspec knows (``s3://bucket/run``)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from xtrain.errors import CheckpointError, ConfigurationError, MissingDependencyError, explain

MANIFEST = "manifest.json"
SUFFIX = ".ckpt"


class Remote:
    """A place in a file system of fsspec, with what checkpoints need of `pathlib.Path`.

    Whatever such a file system raises is an OSError here.

    Args:
        url: with its protocol, as fsspec reads it.
    """

    def __init__(self, url: str) -> None:
        protocol, mark, rest = url.rpartition("://")
        self._url = f"{protocol}{mark}{rest.rstrip('/')}"

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"Remote({self._url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and other._url == self._url

    def __hash__(self) -> int:
        return hash(self._url)

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self._url.removesuffix('/')}/{name}" if self.name else f"{self._url}{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self._url.rpartition("://")[2].rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return Path(self.name).suffix

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return Path(self.name).stem

    @property
    def parent(self) -> Remote:
        """The folder above."""
        return Remote(self._url[: len(self._url) - len(self.name)])

    def with_name(self, name: str) -> Remote:
        """Return the place of another name in the same folder."""
        return Remote(f"{self._url[: len(self._url) - len(self.name)]}{name}")

    @cached_property
    def _system(self) -> tuple[Any, str]:
        """The file system, and the path in it."""
        from fsspec.core import url_to_fs  # torch itself needs fsspec

        try:
            system, path = url_to_fs(self._url)
        except ImportError as error:
            fix = f"pip install {str(error).split()[1].lower()}" if str(error).startswith("Install") else str(error)
            raise MissingDependencyError(explain(f"the package that opens {self._url}", str(error), fix)) from error
        except ValueError as error:
            fix = "a folder of this machine, 'runs', or a URL such as 's3://bucket/runs'"
            raise ConfigurationError(
                explain("a path or a URL that fsspec opens", f"{self._url}: {error}", fix)
            ) from error
        return system, str(path)

    @contextmanager
    def asked(self) -> Iterator[tuple[Any, str]]:
        """Give the file system and the path in it, asked anew: other processes write there, too."""
        system, path = self._system
        try:
            system.invalidate_cache()
            yield system, path
        except OSError:
            raise
        except Exception as error:  # each file system has errors of its own
            raise OSError(f"{self._url}: {type(error).__name__}: {error}") from error

    def exists(self) -> bool:
        """Return whether there is a file or a folder."""
        with self.asked() as (system, path):
            return bool(system.exists(path))

    def is_file(self) -> bool:
        """Return whether there is a file."""
        with self.asked() as (system, path):
            return bool(system.isfile(path))

    def is_dir(self) -> bool:
        """Return whether there is a folder, or something whose name begins as if there were one."""
        with self.asked() as (system, path):
            return bool(system.isdir(path))

    def mkdir(self) -> None:
        """Make the folder, where there are such; those above, too."""
        with self.asked() as (system, path):
            system.makedirs(path, exist_ok=True)

    def sizes(self) -> dict[str, int]:
        """Return what lies in this folder: bytes by name; folders have 0."""
        with self.asked() as (system, path):
            found = system.ls(path, detail=True)
        return {Path(entry["name"].rstrip("/")).name: int(entry.get("size") or 0) for entry in found}

    @contextmanager
    def open(self, mode: str = "rb") -> Iterator[IO[bytes]]:
        """Open the file."""
        with self.asked() as (system, path), system.open(path, mode) as file:
            yield file

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return what the file holds."""
        with self.asked() as (system, path):
            return str(system.cat_file(path).decode(encoding))

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        """Make the file, whole or not at all."""
        with self.asked() as (system, path):
            system.pipe_file(path, text.encode(encoding))

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the file."""
        with self.asked() as (system, path):
            if not missing_ok or system.exists(path):
                system.rm_file(path)


Place = Path | Remote


def place(path: str | os.PathLike[str] | Remote) -> Place:
    """Return `path` as what it is: a path of this machine, or a URL.

    Raises:
        ConfigurationError: for what is no path, or a URL that was a `pathlib.Path` before, which loses a slash.
    """
    if isinstance(path, Remote):
        return path
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ConfigurationError(explain("a path, or a URL, as text", repr(path), "'runs/gan' or 's3://bucket/gan'"))
    text = os.fspath(path)
    protocol, mark, rest = text.partition("://")
    if mark and protocol in ("file", "local"):
        return Path(rest)
    if not mark and re.match(r"[a-z][a-z0-9+:.-]+:/[^/]", text):
        fix = f"'{text.replace(':/', '://', 1)}' as a str"
        raise ConfigurationError(explain("a URL as text", f"{text!r}, which a pathlib.Path has changed", fix))
    return Remote(text) if mark else Path(text)


def foreign_folder(path: Place) -> CheckpointError:
    """Return the error for a checkpoint that would replace a folder with other things in it."""
    expected = "a new name, or a checkpoint that is to be replaced"
    return CheckpointError(
        explain(expected, f"{path}, a folder with other things in it", "trainer.save_checkpoint('model.ckpt')")
    )
