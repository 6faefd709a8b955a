"""Checksums of files, by blocks: the first ones are computed while the last ones are written, and several at once."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK = 1 << 26
"""Bytes that have a checksum of their own; the last block of a file is shorter. Part of schema 1."""
_CHUNK = 1 << 18  # stays in the cache of a core


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
