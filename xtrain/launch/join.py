"""Join the processes of a run, or start the missing ones, and let them fail as one."""

from __future__ import annotations

import os
import secrets
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from torch import distributed as dist

from xtrain.compat.backends import replica_rank
from xtrain.errors import ConfigurationError, LaunchError, RankFailedError, explain
from xtrain.launch.children import GRACE, Children, Failure, FailureStore, follow_parent, wait_for
from xtrain.launch.environment import LAUNCH_ID, Launch, detect_launcher
from xtrain.launch.stores import STORES, ask_for_a_reason, bind_to_loopback, connect

P = ParamSpec("P")
T = TypeVar("T")

JOIN_SECONDS = 300.0
"""How long the processes of a run wait for each other at the start."""

_in_run = threading.Event()
_world: World | None = None


class World:
    """The processes of this run.

    Attributes:
        launch: this process's place among them.
        store: a `torch.distributed` store that all of them share.
        token: what its keys begin with.
    """

    def __init__(self, launch: Launch, store: Any, own: Any, started: bool) -> None:
        self.launch = launch
        self.token = os.environ.get(LAUNCH_ID) or (secrets.token_hex(16) if started else "xtrain")
        self.store = STORES.PrefixStore(self.token, store)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.failures = FailureStore(STORES.PrefixStore(f"{self.token}-board-{attempt}", own))
        self.ended = False
        self._shown_by_rank_0: BaseException | None = None
        self.children: Children | None = None
        if started:
            self.children = Children(launch.world_size, launch.port, self.token, self.failures, _in_run)
        if LAUNCH_ID in os.environ:
            sys.excepthook = self._report

    def failed(self, error: BaseException) -> None:
        """Take part in the failure of a run: tell the others, or find out what they told.

        Raises:
            RankFailedError: if `error` only says that another rank is gone, or does not come.
        """
        lost = _lost_a_peer(error)
        if lost:
            self.failures.wait_in_vain(self.launch.rank)
        if self.children is not None:
            first = self.children.first_failure(GRACE) if lost else None
        else:
            first = wait_for(self.failures.read, GRACE / 2) if lost else None
            self._shown_by_rank_0 = error
        missing = self.failures.missing(self.launch.world_size) if lost and first is None else []
        if self.children is not None:
            self.children.end(0.5 if isinstance(error, KeyboardInterrupt) else 2.0)
            self.ended = True
        if lost:
            self._shown_by_rank_0 = RankFailedError(_lost_text(first, missing, error))
            raise self._shown_by_rank_0 from (error if first is None else None)
        if isinstance(error, Exception) and self.children is None:
            text = "".join(traceback.format_exception(error))
            self.failures.write(Failure(self.launch.rank, f"{type(error).__name__}: {error}", text))

    def _report(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if error is not self._shown_by_rank_0:
            sys.__excepthook__(kind, error, trace)


def _lost_text(first: Failure | None, missing: Sequence[int], error: BaseException) -> str:
    if first is not None:
        return str(first)
    absent = f"nothing from rank {', '.join(map(str, missing))}; " if missing else ""
    fix = "the same calls on every rank, or backend_options={'timeout': 3600} for a slow one"
    return explain("every rank to come to the same step", f"{absent}{error}", fix)


def current_launch() -> Launch:
    """Return what started this process, and its place among the processes of the run.

    Raises:
        ConfigurationError: see `xtrain.launch.environment.detect_launcher`.
    """
    return read_launch() if _world is None else _world.launch


_PROCESS, _RANK = os.getpid(), os.environ.get("RANK")


def read_launch() -> Launch:
    """Return what the environment says, read once: a process does not change its place, but a fork may have another."""
    rank = os.environ.get("RANK")
    return _read_launch(None if os.getpid() == _PROCESS or rank == _RANK else rank)


@cache
def _read_launch(fork: str | None) -> Launch:
    """Read it for this process, or for the `fork` of it that has another rank, as in a notebook."""
    return detect_launcher(os.environ, _parent_command(), any(map(os.isatty, range(3))))


def own_rank() -> int:
    """Return the rank of this process, or of this thread where a launcher starts threads; 0 for a run of one.

    It is known before a run begins, unless the processes are to be started by it.

    Raises:
        ConfigurationError: see `current_launch`.
    """
    launch = current_launch()
    return launch.rank if launch.joined else replica_rank() or 0


def join(devices: int | None = None, seconds: float = JOIN_SECONDS) -> World | None:
    """Join the launcher's processes, or start ``devices - 1`` more; the second call returns what the first did.

    Args:
        devices: how many processes the script asks for on this machine; None takes what the launcher started.
        seconds: how long to wait for the others.

    Returns:
        The world, or None for a run of one process.

    Raises:
        ConfigurationError: if `devices` contradicts the launcher.
        LaunchError: if the processes cannot be started or do not find each other.
    """
    global _world
    launch = current_launch()
    if _world is not None and _world.ended:
        fix = "one try per program: python script.py again"
        raise LaunchError(explain("the processes of this program to be alive", "they ended with an earlier error", fix))
    if launch.joined:
        _check_devices(launch, devices)
    if _world is not None or (launch.world_size == 1 and (launch.joined or devices in (None, 1))):
        return _world
    _world = World(launch, *connect(launch, seconds), started=False) if launch.joined else _start(devices or 1)
    _gather(_world, seconds)
    return _world


def rank_zero_only(function: Callable[P, T]) -> Callable[P, T | None]:
    """Return `function`, doing nothing and returning None on every process or replica but the first.

    It works inside and outside of a run: for what a script writes or prints. Nothing in it may talk to
    the other processes, which do not come there.

    Example:
        >>> @rank_zero_only
        ... def announce(text):
        ...     print(text)
        >>> announce("written once, on however many processes")
        written once, on however many processes
    """

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T | None:
        return function(*args, **kwargs) if own_rank() == 0 else None

    return wrapper


@contextmanager
def fail_as_one() -> Iterator[None]:
    """Let the ranks of a run fail as one: whoever loses a peer inside reports that peer's error.

    Raises:
        RankFailedError: in place of an error that only says that another rank is gone.
    """
    _in_run.set()
    if _world is not None:
        _world.failures.run += 1
    try:
        yield
    except BaseException as error:
        if _world is not None:
            _world.failed(error)
        raise
    finally:
        _in_run.clear()


def raise_failure() -> None:
    """Raise what failed on another rank of this run, for a rank that has waited long; return if nothing did.

    Raises:
        RankFailedError: with the first failure.
    """
    first = None if _world is None else _world.failures.read()
    if first is not None:
        raise RankFailedError(str(first))


def _check_devices(launch: Launch, devices: int | None) -> None:
    here = launch.local_world_size or launch.world_size
    if devices in (None, here):
        return
    source = launch.sources.get("local_world_size", launch.sources["world_size"])
    received = f"devices={devices}, but {launch.launcher} started {here} ({source})"
    if launch.launcher == "xtrain":
        received = f"devices={devices} after a Trainer with devices={here}"
    fix = f"Trainer(devices={here}), or leave devices out"
    raise ConfigurationError(explain("devices to be the number of processes that were started", received, fix))


def _start(count: int) -> World:
    ask_for_a_reason(count)
    bound = bind_to_loopback()
    sources = {"world_size": f"devices={count}", "local_world_size": f"devices={count}"}
    address, port = bound.getsockname()
    launch = Launch("xtrain", 0, 0, count, count, sources=sources, address=address, port=port)
    return World(launch, *connect(launch, JOIN_SECONDS, bound), started=True)


def _gather(world: World, seconds: float) -> None:
    """Wait until every rank is here."""
    launch, attempt = world.launch, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = STORES.PrefixStore(f"join-{attempt}", world.store)
    if store.add(f"claims{launch.rank}", 1) > 1:
        received = f"two with RANK={launch.rank} of WORLD_SIZE={launch.world_size}"
        fix = "start the program once; a program that a rank starts needs an environment without RANK and WORLD_SIZE"
        raise LaunchError(explain("one process for each rank", received, fix))
    keys = [f"rank{rank}" for rank in range(launch.world_size)]
    store.set(keys[launch.rank], "here")

    def ready() -> bool | Failure | None:
        if world.children is not None and world.children.failure is not None:
            return world.children.failure
        return store.check(keys) or None

    try:
        found = wait_for(ready, seconds)
        missing = [] if found else [rank for rank, key in enumerate(keys) if not store.check([key])]
    except dist.DistError as error:
        raise LaunchError(explain("all ranks to arrive", f"rank {launch.rank} lost its connection to them")) from error
    if isinstance(found, Failure):
        raise RankFailedError(str(found))
    if found is None:
        fix = "start every rank with the same MASTER_ADDR and MASTER_PORT, and let each come to Trainer.fit"
        received = f"none of rank {', '.join(map(str, missing))} within {seconds:g} s"
        raise LaunchError(explain(f"{launch.world_size} ranks (WORLD_SIZE)", received, fix))


_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket Timeout",
    "Timed out waiting",
    "timed out after",
    "recvBytes",
    "sendBytes",
    "remote process exited",
    "communicator was aborted",
)


def _lost_a_peer(error: BaseException) -> bool:
    """Return whether `error`, of gloo, nccl or a store, only says that another rank is gone."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST)


def _parent_command() -> list[str]:
    """Return the command line of the parent process; empty where the system does not tell."""
    try:
        line = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return []
    return line.decode(errors="replace").rstrip("\0").split("\0")


follow_parent()
