"""The store in which the processes of a run meet: who keeps it, where it listens, and how the others reach it."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch import distributed as dist

from xtrain.errors import ConfigurationError, LaunchError, explain
from xtrain.launch.environment import Launch

MANY = "XTRAIN_MANY_PROCESSES"
"""A variable: 1 says that more processes than processors are meant."""
STORES: Any = dist  # torch exports its stores without declaring them
_ANSWER = timedelta(seconds=2)  # for one try: in it, Ctrl-C waits
_TRIES = 3
_LOOPBACK = "127.0.0.1"


def ask_for_a_reason(count: int) -> None:
    """Refuse more processes than processors, unless the user says that this is meant.

    Raises:
        ConfigurationError: with the line that says so.
    """
    processors = os.cpu_count() or 1
    if count > processors and os.environ.get(MANY) != "1":
        received = f"devices={count}, on a machine with {processors}"
        fix = f"Trainer(devices={processors}), or {MANY}=1 python script.py if that is on purpose"
        raise ConfigurationError(explain("at most as many processes as processors", received, fix))


def bind_to_loopback(port: int = 0) -> socket.socket:
    """Return a socket that no other machine can reach, at `port` or at one of the system's choice."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((_LOOPBACK, port))
    except OSError:
        bound.close()
        raise
    return bound


def connect(launch: Launch, seconds: float, bound: socket.socket | None = None) -> tuple[Any, Any]:
    """Return two connections to the store of a run, which rank 0 keeps unless its launcher does.

    Args:
        launch: says where, and which rank this is.
        seconds: how long to try.
        bound: where rank 0 listens, if that is decided.

    Raises:
        LaunchError: if rank 0 cannot listen there, or the others cannot reach it.
    """
    try:
        store = _main_store(launch, seconds, bound)
        store.set_timeout(timedelta(seconds=seconds))
        return store, _client(launch)
    except (dist.DistError, ValueError, OSError) as error:
        if "EADDRINUSE" in str(error) or getattr(error, "errno", None) == errno.EADDRINUSE:
            fix = "torchrun --standalone --nproc_per_node=2 script.py, or another MASTER_PORT"
            received = f"MASTER_PORT={launch.port}, in use on {launch.address}"
            raise LaunchError(explain("a free port", received, fix)) from error
        raise _unreachable(launch, str(error).splitlines()[0]) from error


def _main_store(launch: Launch, seconds: float, bound: socket.socket | None) -> Any:
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if launch.rank != 0 or (agent and bound is None):
        return _reach(launch, seconds)
    if bound is None and launch.address in (_LOOPBACK, "localhost"):
        bound = bind_to_loopback(launch.port)
    if bound is None:
        limit = timedelta(seconds=seconds)
        return STORES.TCPStore(launch.address, launch.port, is_master=True, wait_for_workers=False, timeout=limit)
    bound.listen(1024)
    return STORES.TCPStore(
        _LOOPBACK, launch.port, is_master=True, wait_for_workers=False, master_listen_fd=bound.detach()
    )


def _client(launch: Launch) -> Any:
    return STORES.TCPStore(launch.address, launch.port, is_master=False, wait_for_workers=False, timeout=_ANSWER)


def _reach(launch: Launch, seconds: float) -> Any:
    """Return a connection to the store of rank 0, tried again and again: each try is short, so Ctrl-C works."""
    deadline, refused, reason = time.monotonic() + seconds, 0, ""
    while time.monotonic() < deadline and refused < _TRIES:
        try:
            socket.create_connection((launch.address, launch.port), timeout=_ANSWER.total_seconds()).close()
        except socket.gaierror as error:
            raise _unreachable(launch, f"the name does not resolve: {error}") from error
        except OSError as error:
            reason = f"within {seconds:g} s: {error}"
            time.sleep(0.2)
            continue
        found = _in_time(lambda: _client(launch))
        if not isinstance(found, Exception):
            return found
        refused, reason = refused + 1, str(found).splitlines()[0]  # whoever listens there is busy, or no store
    raise _unreachable(launch, reason)


def _in_time(work: Callable[[], Any]) -> Any:
    """Return what `work` returns or raises; waiting for it can be interrupted, and ends: not every listener answers."""
    box: list[Any] = []

    def fill() -> None:
        try:
            box.append(work())
        except Exception as error:  # handed over
            box.append(error)

    thread = threading.Thread(target=fill, name="xtrain-reach", daemon=True)
    thread.start()
    thread.join(_TRIES * _ANSWER.total_seconds())
    return box[0] if box else TimeoutError("what listens there does not answer as a store")


def _unreachable(launch: Launch, reason: str) -> LaunchError:
    expected = f"rank 0 at MASTER_ADDR={launch.address} MASTER_PORT={launch.port}"
    fix = "start rank 0 too, with the same MASTER_ADDR and MASTER_PORT"
    return LaunchError(explain(expected, f"no connection from rank {launch.rank} ({reason})", fix))
