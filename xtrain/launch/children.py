"""The other processes of a run that plain ``python script.py`` with ``devices=N`` starts: the same command again.

Rank 0 stays in the caller, so ``fit`` returns where it was called. It watches the others; whichever fails
first decides the message, and nobody outlives the run by more than a few seconds.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from xtrain.errors import LaunchError, explain
from xtrain.launch.environment import LAUNCH_ID

GRACE = 5.0
"""Seconds a process may take to notice that another one failed, before it is ended."""
_POLL = 0.1
_PARENT, _FOLLOWER = "XTRAIN_PARENT_PID", "XTRAIN_FOLLOWS"
_INTERACTIVE = "an interactive session, which has no script"
_FORK = (
    "def train(): Trainer(...).fit(...)  # makes everything itself, in a kernel that has not used CUDA yet\n"
    "      from accelerate import notebook_launcher; notebook_launcher(train, num_processes=2)\n"
    "     "
)
_START_DIRECTORY = os.getcwd()  # noqa: PTH109  # where the command was given: the script may leave it before fit


@dataclass(frozen=True)
class Failure:
    """The first thing that went wrong in a run: the rank's number, what, and its traceback or an empty text."""

    rank: int
    what: str
    traceback: str = ""

    def __str__(self) -> str:
        head = f"Rank {self.rank} failed first: {self.what}"
        return f"{head}\n--- traceback of rank {self.rank} ---\n{self.traceback.rstrip()}" if self.traceback else head


class FailureStore:
    """Where a rank that fails says why, for all to read; the first entry stays.

    Args:
        store: a connection that nothing else uses: another user's wait would block it.

    Attributes:
        run: counts the runs of this program, whose failures are apart.
    """

    def __init__(self, store: Any) -> None:
        self._store, self.run = store, 1

    def write(self, failure: Failure) -> None:
        """Say what failed, unless another rank did before."""
        with suppress(Exception):  # the store is gone with its process: the error itself is still raised
            self._store.compare_set(f"failure{self.run}", "", json.dumps(asdict(failure)))

    def read(self) -> Failure | None:
        """Return the first failure, if there is one."""
        with suppress(Exception):
            if self._store.check([f"failure{self.run}"]):
                return Failure(**json.loads(self._store.get(f"failure{self.run}")))
        return None

    def wait_in_vain(self, rank: int) -> None:
        """Say that `rank` waited for others that did not come."""
        with suppress(Exception):
            self._store.set(f"waited{self.run}-{rank}", "1")

    def missing(self, count: int) -> list[int]:
        """Return which of `count` ranks did not wait for others, as a rank that hangs elsewhere."""
        with suppress(Exception):
            absent = [rank for rank in range(count) if not self._store.check([f"waited{self.run}-{rank}"])]
            return absent if len(absent) < count else []
        return []


class Children:
    """Ranks 1 to ``count - 1``, started and watched by rank 0.

    Args:
        count: number of ranks, this one included.
        port: where rank 0 keeps the store they meet at.
        token: what the keys of this run begin with.
        board: where they say why they fail.
        in_run: set while rank 0 is in a run, during which no child may end.
    """

    def __init__(self, count: int, port: int, token: str, board: FailureStore, in_run: threading.Event) -> None:
        self.failure: Failure | None = None
        self._board, self._in_run, self._closing = board, in_run, threading.Event()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        command = own_command()
        shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(port), LAUNCH_ID: token, _PARENT: str(os.getpid())}
        shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # the store exists: whoever reads this only connects
        environ = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)), **os.environ, **shared}
        self._watcher = threading.Thread(target=self._watch, name="xtrain-ranks", daemon=True)
        atexit.register(self._at_exit)
        try:
            for rank in range(1, count):
                own = {**environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                # A session of its own: Ctrl-C comes to rank 0 alone, and its loader workers can be ended with it.
                self._processes[rank] = subprocess.Popen(
                    command, cwd=_START_DIRECTORY, env=own, stdin=subprocess.DEVNULL, start_new_session=True
                )
        except BaseException:
            self.end(0.0)
            raise
        self._watcher.start()

    def first_failure(self, wait: float) -> Failure | None:
        """Return what failed first, for a rank 0 that has just lost a peer; None if nothing did in `wait` seconds."""
        wait_for(lambda: self.failure, wait)
        return self.failure

    def end(self, grace: float) -> None:
        """End the children and whatever they started, with a signal they cannot ignore after `grace` seconds."""
        self._closing.set()
        for number, wait in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
            for process in self._processes.values():
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, number)
            wait_for(lambda: all(p.poll() is not None for p in self._processes.values()) or None, wait)
        # An interpreter that ends while another thread is inside a call to the store aborts.
        if self._watcher.is_alive() and self._watcher is not threading.current_thread():
            self._watcher.join(GRACE)

    def _watch(self) -> None:
        while not self._closing.wait(_POLL):
            self.failure = self._board.read() or self._dead()
            if self.failure is not None:
                self._follow_up(self.failure)
                return

    def _dead(self) -> Failure | None:
        """Return a child that ended badly, or ended at all while rank 0 is in a run."""
        for rank, process in self._processes.items():
            status = process.poll()
            if status is not None and (status or self._in_run.is_set()):
                # Its loader workers hold its sockets open, so rank 0 would not notice that it is gone.
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                time.sleep(_POLL)  # another one may have said why, and this one only lost its peer
                return self._board.read() or Failure(rank, exit_text(status))
        return None

    def _follow_up(self, failure: Failure) -> None:
        """End rank 0 from outside if it does not notice by itself, as in a collective that has no timeout."""
        wait_for(lambda: self._closing.is_set() or not self._in_run.is_set() or None, GRACE)
        if self._in_run.is_set() and not self._closing.is_set():
            _die(f"{failure}\nRank 0 did not notice within {GRACE:g} s and was ended.", self)

    def _at_exit(self) -> None:
        """Let the children come to their own end after rank 0; a bad one makes the exit status 1."""
        failed = getattr(sys, "last_value", None) is not None
        finished = None if self._closing.is_set() or failed else self._await_all(6 * GRACE)
        already = self._closing.is_set() or failed
        self.end(0.5)
        if already:
            return
        if not finished:
            _die(f"Another rank was still running {6 * GRACE:g} s after rank 0 had ended, and was ended.", self)
        bad = next(((r, p.returncode) for r, p in self._processes.items() if p.returncode), None)
        if bad is not None:
            _die(str(self._board.read() or Failure(bad[0], exit_text(bad[1]))), self)

    def _await_all(self, seconds: float) -> bool:
        done = wait_for(lambda: all(p.poll() is not None for p in self._processes.values()) or None, seconds)
        return done is not None


def _die(text: str, children: Children) -> None:
    with suppress(OSError, ValueError):  # nobody reads any more
        if sys.stdout is not None:
            sys.stdout.flush()
        print(f"xtrain: {text}", file=sys.stderr, flush=True)  # where there is no stderr, it is said on stdout
    children.end(0.5)
    os._exit(1)


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    """Return what `condition` returns as soon as that is not None; None after so many seconds."""
    deadline = time.monotonic() + seconds
    while (found := condition()) is None and time.monotonic() < deadline:
        time.sleep(_POLL / 2)
    return found


def exit_text(status: int) -> str:
    """Say in words how a process ended that said nothing itself."""
    if status == 0:
        return "it ended before the run was over (does every rank come to the same Trainer.fit?)"
    if status > 0:
        return f"it ended with exit status {status}; what it printed is above"
    name = signal.Signals(-status).name
    return f"it was killed by {name}" + (" (out of memory?)" if -status == signal.SIGKILL else "")


# -------------------------------------------------------------------- what to run again


def own_command(arguments: Sequence[str] | None = None) -> list[str]:
    """Return the command line that started this process.

    Args:
        arguments: the original ones; None takes them from `sys.orig_argv`.

    Raises:
        LaunchError: if it cannot be run again.
    """
    given = list(sys.orig_argv if arguments is None else arguments)
    reason = _not_repeatable(given)
    if reason is not None:
        fix = "put the code in a file; python file.py, or torchrun --nproc_per_node=2 file.py"
        if reason == _INTERACTIVE:
            fix = f"{_FORK}, or {fix}"
        raise LaunchError(
            explain("a command that can be run again for every rank, as Trainer(devices=2) does", reason, fix)
        )
    return [sys.executable, *given[1:]]


def _not_repeatable(arguments: Sequence[str]) -> str | None:
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    top = (getattr(spec, "name", None) or "").split(".")[0]
    file = os.path.basename(getattr(main, "__file__", None) or "")  # noqa: PTH119  # also of paths that do not exist
    if hasattr(sys, "ps1") or sys.flags.interactive or file == "ipykernel_launcher.py":
        return _INTERACTIVE
    if top in ("pytest", "unittest") or file in ("pytest", "py.test"):
        return f"{top or file}, which would run the whole test session again"
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is not None and multiprocessing.parent_process() is not None:
        return "a worker process of multiprocessing"
    path = getattr(main, "__file__", None) or ""
    if "-c" not in arguments and (not path or path.startswith(("<", "/dev/", "/proc/"))):
        return "a program read from standard input or a pipe"
    return None


# -------------------------------------------------------------------- the child's side


def follow_parent() -> None:
    """Make this process end when rank 0, which started it, is gone. Does nothing in any other process."""
    parent = os.getppid()
    # Not the number of this very parent: nobody's child, or what a child has started itself.
    if os.environ.get(_PARENT) != str(parent) or _FOLLOWER in os.environ:
        return
    os.environ[_FOLLOWER] = str(os.getpid())

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(5 * _POLL)
        os._exit(1)

    threading.Thread(target=watch, name="xtrain-parent", daemon=True).start()
