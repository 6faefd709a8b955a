"""Order among the replicas of a rehearsal on the CPU, which are threads of one process.

The runtime there wants more order than a TPU: graphs are launched one thread at a time, and all threads meet
afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Rendezvous:
    """Where the replicas of one process meet. There is one per process: threads share nothing else of a run.

    Attributes:
        lock: held while a graph is launched.
    """

    _shared: Rendezvous | None = None
    _making = threading.Lock()
    _PATIENCE = 600.0  # seconds; another replica may be compiling

    def __init__(self, count: int) -> None:
        self.lock = threading.Lock()
        self._barrier = threading.Barrier(count)

    @classmethod
    def of_process(cls, count: int) -> Rendezvous:
        """Return the meeting of this process for `count` threads; a new one if the last one broke up."""
        with cls._making:
            if cls._shared is None or cls._shared._barrier.broken or cls._shared._barrier.parties != count:
                cls._shared = cls(count)
            return cls._shared

    def launch(self, sync: Callable[[], None]) -> None:
        """Wait for the others, call `sync` alone, then wait again: a collective gives up after ten seconds."""
        self._barrier.wait(self._PATIENCE)
        with self.lock:
            sync()
        self._barrier.wait(self._PATIENCE)

    def leave(self) -> None:
        """Wake the others with an error: this replica will not come again."""
        self._barrier.abort()
