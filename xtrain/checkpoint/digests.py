"""Checksums of files, by blocks: the first ones are computed while the last ones are written, and several at once."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch.serialization import set_crc32_options

BLOCK = 1 << 26
"""Bytes that have a checksum of their own; the last block of a file is shorter. Part of schema 1."""
_CHUNK = 1 << 18  # stays in the cache of a core
Facts = dict[str, Any]
"""Of one file: "bytes", and "sha256" of its blocks."""


class Following(threading.Thread):
    """Computes the sha256 of each block of a file while another thread writes it from front to back.

    Attributes:
        found: the checksums, complete once the context is left.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(name="xtrain-sha256", daemon=True)
        self._path, self._complete = path, threading.Event()
        self.found: list[str] = []

    def __enter__(self) -> Following:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._complete.set()
        self.join()

    def run(self) -> None:
        """Hash what there is, until the writer is done."""
        digest, left, buffer = hashlib.sha256(), BLOCK, memoryview(bytearray(_CHUNK))
        with self._path.open("rb", buffering=0) as file:
            while True:
                complete = self._complete.is_set()  # asked before the read that may come back empty
                count = file.readinto(buffer[: min(left, _CHUNK)])
                digest.update(buffer[:count])
                left -= count
                if not left:
                    self.found.append(digest.hexdigest())
                    digest, left = hashlib.sha256(), BLOCK
                elif not count and complete:
                    break
                elif not count:
                    time.sleep(0.001)
        if left < BLOCK or not self.found:
            self.found.append(digest.hexdigest())


class Digesting:
    """A file that is written from front to back, and whose checksums are computed on the way.

    Args:
        file: takes the bytes.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self._left, self._bytes = file, hashlib.sha256(), BLOCK, 0
        self._found: list[str] = []

    def write(self, data: Any) -> int:
        """Write all of `data`; returns how many bytes that are."""
        rest = memoryview(data).cast("B")
        count = len(rest)
        self._file.write(rest)
        self._bytes += count
        while len(rest):
            self._digest.update(rest[: self._left])
            rest, self._left = rest[self._left :], max(0, self._left - len(rest))
            if not self._left:
                self._found.append(self._digest.hexdigest())
                self._digest, self._left = hashlib.sha256(), BLOCK
        return count

    def flush(self) -> None:
        """Nothing is kept back here."""

    def facts(self) -> Facts:
        """Return size and checksums of what was written."""
        last = [self._digest.hexdigest()] if self._left < BLOCK or not self._found else []
        return {"bytes": self._bytes, "sha256": self._found + last}


_saves, _counting = 0, threading.Lock()


@contextmanager
def without_crc32() -> Iterator[None]:
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


def sha256_of(folder: Path, sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Return the sha256 of each block of some files.

    Args:
        folder: where they are.
        sizes: bytes, by name.
    """
    blocks = [(name, at) for name, size in sizes.items() for at in range(0, max(size, 1), BLOCK)]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        digests = list(threads.map(lambda block: _sha256(folder / block[0], block[1]), blocks))
    found: dict[str, list[str]] = {name: [] for name in sizes}
    for (name, _), digest in zip(blocks, digests, strict=True):
        found[name].append(digest)
    return found


def _sha256(path: Path, at: int) -> str:
    digest, left, buffer = hashlib.sha256(), BLOCK, memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        file.seek(at)
        while left and (count := file.readinto(buffer[: min(left, _CHUNK)])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()
