"""The child process: loads the user's code, runs the checks of a group, tells what they find line by line."""

from __future__ import annotations

import faulthandler
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xtrain.rehearsal.findings import Blocked, Figure, Finding, Skipped
from xtrain.rehearsal.incidents import exits, forks, incident
from xtrain.rehearsal.places import NOWHERE, Place, current_place, is_users, place_of_error, users_traceback

LOADING = "loading"
LOAD_SECONDS = 45.0
_KINDS = {Finding: "finding", Skipped: "skipped", Figure: "figure", Blocked: "blocked"}


class Channel:
    """Where a child writes, one JSON object a line.

    Args:
        descriptor: of a pipe.
    """

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)  # programs that user code starts shall not keep it open
        self._descriptor = descriptor

    def send(self, kind: str, **values: Any) -> None:
        """Write a message."""
        os.write(self._descriptor, (json.dumps({"kind": kind, **values}) + "\n").encode())


def main() -> None:
    """Run the job that the command line describes."""
    descriptor, job = int(sys.argv[1]), json.loads(sys.argv[2])
    sys.argv = sys.argv[:1]
    serve(Channel(descriptor), job)


def serve(channel: Channel, job: dict[str, Any], memory: Any = None) -> None:
    """Load the subject and run the checks.

    Args:
        channel: to the parent.
        job: what to do, see `xtrain.rehearsal.groups.Group.job`.
        memory: the subject, if it was in the memory of the parent.
    """
    warnings.simplefilter("default")  # a fork may have been told that they are errors
    with Path(job["dump"]).open("w") as dump:
        faulthandler.enable(file=dump)
        _watch_exits(channel)
        channel.send("begin", check=LOADING)
        subject = _loaded(channel, job, memory, dump)
        blocked = ""
        for place in job["checks"] if subject is not None else ():
            blocked = _run(channel, place, subject, job, dump, blocked) or blocked
        if subject is not None:
            channel.send("done")
        faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()


def _loaded(channel: Channel, job: dict[str, Any], memory: Any, dump: Any) -> Any:
    import torch
    import torch._dynamo  # an optimizer would import it in the middle of a check

    from xtrain.errors import XTrainError
    from xtrain.rehearsal.subject import Source, load_subject

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    faulthandler.dump_traceback_later(LOAD_SECONDS, exit=True, file=dump)
    try:
        return memory if memory is not None else load_subject(Source(**job["source"]))
    except XTrainError as error:
        channel.send("unusable", text=str(error))
    except BaseException as error:
        channel.send("unusable", text=_why(job["source"]["module"], error))
    return None


def _why(name: str, error: BaseException) -> str:
    if isinstance(error, EOFError):
        return f"{name} asks for input while it is imported.\n{users_traceback(error)}"
    if isinstance(error, SystemExit):
        return f"{name} ends the process while it is imported (exit status {error.code}).\n{users_traceback(error)}"
    return f"{name} could not be made.\n{users_traceback(error)}"


def _run(channel: Channel, place: str, subject: Any, job: dict[str, Any], dump: Any, blocked: str) -> str:
    """Run one check; returns why checks that run steps after it need not try, if that is so."""
    from xtrain.rehearsal.check import Request
    from xtrain.rehearsal.registry import load

    check = load(place)
    request = Request(subject, frozenset(job["targets"]), job["steps"], job["devices"], job["memory"])
    channel.send("begin", check=check.name)
    if blocked and check.runs_steps:
        channel.send("skipped", check=check.name, reason=blocked)
        channel.send("end", check=check.name)
        return blocked
    faulthandler.dump_traceback_later(check.seconds, exit=True, file=dump)
    why = ""
    try:
        for found in check.run(request):
            channel.send(_KINDS[type(found)], **asdict(found))
            why = found.reason if isinstance(found, Blocked) else why
    except BaseException as error:
        where = place_of_error(error)
        own = where.file in (None, inspect.getsourcefile(type(check)))
        if own and not isinstance(error, SystemExit):
            channel.send("failed", check=check.name, text=f"{type(error).__name__}: {error}")
        else:
            channel.send("finding", **asdict(incident(error, where)))
            why = f"the training step does not run ({shorten(where)})" if check.first else ""
            if why:
                channel.send("blocked", reason=why)
    faulthandler.cancel_dump_traceback_later()
    channel.send("end", check=check.name)
    return why


def shorten(place: Place) -> str:
    """Return ``file:line`` with the file's name only."""
    return f"{Path(place.file).name}:{place.line}" if place.file else "no line is known"


# ---------------------------------------------------------------- ends and copies of the process

real_exit: Callable[[int], Any] = os._exit
"""`os._exit` as it was before it was watched."""


def _watch_exits(channel: Channel) -> None:
    """Tell where user code ends the process by ``os._exit``, and where it forks it: the copy ends at once."""
    owner, forked_at = os.getpid(), [NOWHERE]

    def leave(status: int) -> None:
        place = current_place()
        if os.getpid() == owner and place.line is not None:
            channel.send("finding", **asdict(exits(place)))
            channel.send("leaving")
        real_exit(status)

    def before() -> None:
        caller = sys._getframe(1)  # of os.fork: multiprocessing, for the workers of a loader, or the user
        file, line = caller.f_code.co_filename, caller.f_lineno
        forked_at[0] = Place(file, line) if is_users(file) else NOWHERE

    def in_copy() -> None:
        if forked_at[0].line is not None:
            channel.send("finding", **asdict(forks(forked_at[0])))
            real_exit(0)

    os._exit = leave  # type: ignore[assignment]
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=before, after_in_child=in_copy)
