"""Order among the replicas of a rehearsal on the CPU, which are threads of one process.

The runtime there wants more order than a TPU: graphs with communication are launched one thread at a time, and all
threads meet before and afterwards. What they are about to say to each other is compared first: replicas that say
different things would wait for each other, and the runtime ends a process whose replicas wait for ten seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from xtrain.collectives import different_calls
from xtrain.errors import LaunchError, RankFailedError, explain


class Rendezvous:
    """Where the replicas of one process meet. There is one per process: threads share nothing else of a run.

    Attributes:
        lock: held while a graph is launched.
    """

    _shared: Rendezvous | None = None
    _making = threading.Lock()
    _stuck = False  # a later graph would have what one replica traced and the others did not, and wait for them
    _PATIENCE = 600.0  # seconds; another replica may be compiling

    def __init__(self, count: int) -> None:
        self.lock = threading.Lock()
        self._count, self._changed = count, threading.Condition()
        self._said: dict[int, str] = {}
        self._heard: list[str] = []
        self._meetings, self._left = 0, ""

    @classmethod
    def of_process(cls, count: int) -> Rendezvous:
        """Return the meeting of this process for `count` threads; a new one if the last one broke up.

        Raises:
            LaunchError: if it broke up in the middle of a step.
        """
        with cls._making:
            if cls._stuck:
                received = "an earlier run, whose last step has communication that not all of them came to"
                raise LaunchError(explain("replicas that are in step", received, "python script.py again"))
            if cls._shared is None or cls._shared._left or cls._shared._count != count:
                cls._shared = cls(count)
            return cls._shared

    def launch(self, sync: Callable[[], None], rank: int, said: str) -> None:
        """Wait for the others, call `sync` alone, then wait again: a collective gives up after ten seconds.

        Args:
            sync: launches a graph.
            rank: of this replica.
            said: the communication in that graph, in words.

        Raises:
            ProtocolError: on every replica, if they are about to say different things.
            RankFailedError: if another replica ends with an error, or does not come.
        """
        heard = self._meet(rank, said)
        if len(set(heard)) > 1:
            raise different_calls(heard)
        with self.lock:
            sync()
        self._meet(rank, said)

    def _meet(self, rank: int, said: str) -> list[str]:
        """Return what all replicas said, in order of rank, when the last one is here."""
        with self._changed:
            before = self._meetings
            self._said[rank] = said
            if len(self._said) == self._count:
                self._heard = [text for _, text in sorted(self._said.items())]
                self._meetings, self._said = before + 1, {}
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._meetings > before or self._left, self._PATIENCE)
            if self._meetings == before:
                raise RankFailedError(self._left or f"Another replica did not come within {self._PATIENCE:g} s.")
            return self._heard

    def leave(self, rank: int, error: BaseException, in_step: bool) -> None:
        """Wake the others with an error: this replica will not come again.

        Args:
            rank: of this replica.
            error: why.
            in_step: it has traced communication that was not launched.
        """
        Rendezvous._stuck = Rendezvous._stuck or in_step
        with self._changed:
            self._left = self._left or f"Rank {rank} failed first: {type(error).__name__}: {error}"
            self._changed.notify_all()
