"""A group of checks and its child process: started, listened to, stopped in time, with nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xtrain.rehearsal.check import Check
from xtrain.rehearsal.child import LOAD_SECONDS, LOADING, Channel, real_exit, serve
from xtrain.rehearsal.incidents import dies, hangs
from xtrain.rehearsal.registry import place_of

_ROOT = str(Path(__file__).resolve().parent.parent.parent)
_START = "import sys; sys.path[:1] = [{root!r}]; from xtrain.rehearsal.child import main; sys.path[:1] = []; main()"
_GRACE = 5.0  # a child ends itself at its limit; after so many seconds more it is killed
_SLOW_START = 60.0  # imports of torch and what it needs


class Group:
    """Checks that share a child. A child that dies is replaced by one for the checks that are left.

    Args:
        checks: in order.
        job: what every check is asked, see `xtrain.rehearsal.child.serve`.
        threads: of torch in the child.
        subject: in memory, else None: then the child is a fork of this process, which has it.
    """

    def __init__(
        self, checks: Sequence[type[Check]], job: Mapping[str, Any], threads: int, subject: Any = None
    ) -> None:
        self.left = {check.name: check for check in checks}
        self._job, self._subject = dict(job), subject
        self._variables = {"OMP_NUM_THREADS": str(threads), **checks[0].variables}
        self._folder = Path(tempfile.mkdtemp(prefix="xtrain-check-"))
        self._pid: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._rest, self.current, self._deadline = b"", "", 0.0
        self.pipe = -1

    @property
    def blocks(self) -> bool:
        """Whether a check is left that all others wait for."""
        return any(check.first for check in self.left.values())

    # ---------------------------------------------------------------- start

    def start(self) -> None:
        """Start a child for the checks that are left."""
        self._dump = self._folder / "dump"
        self._dump.unlink(missing_ok=True)
        job = {**self._job, "checks": [place_of(check) for check in self.left.values()], "dump": str(self._dump)}
        self.pipe, writing = os.pipe()
        os.set_blocking(self.pipe, False)
        self._told = False  # whether the child has said why it ends
        self.current, self._deadline, self._rest = LOADING, time.monotonic() + _SLOW_START, b""
        with (self._folder / "output").open("wb") as output:
            if self._subject is None:
                self._spawn(job, writing, output)
            else:
                self._fork(job, writing, output)
        os.close(writing)

    def _spawn(self, job: dict[str, Any], writing: int, output: Any) -> None:
        command = [sys.executable, "-c", _START.format(root=_ROOT), str(writing), json.dumps(job)]
        environment = {**self._variables, **os.environ, **self._variables_to_force()}
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[writing],
            start_new_session=True, env=environment,
        )  # fmt: skip
        self._pid = self._process.pid

    def _variables_to_force(self) -> dict[str, str]:
        return {name: value for name, value in self._variables.items() if name != "OMP_NUM_THREADS"}

    def _fork(self, job: dict[str, Any], writing: int, output: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads: the child uses one
            self._pid = os.fork()
        if self._pid:
            return
        status = 1
        try:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdin = open(0, closefd=False)  # noqa: SIM115  # that of the child, to its end
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115
            os.environ.update(self._variables)
            os.close(self.pipe)
            serve(Channel(writing), job, self._subject)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            real_exit(status)

    # ---------------------------------------------------------------- listen

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield what the child has said since the last call, and what its end means; nothing waits."""
        status = self._poll()  # before the pipe is read: what was said before the end is read then
        yield from self._said()
        if status is None and time.monotonic() > self._deadline:
            self._kill()
            yield from self._said()
            yield from self._overdue()
            self.close()
        elif status is not None:
            self._kill()
            if self.current:
                yield from self._ended(status)
            self.close()

    def _said(self) -> Iterator[dict[str, Any]]:
        with suppress(BlockingIOError):
            while part := os.read(self.pipe, 65536):
                self._rest += part
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            message = json.loads(line)
            if message["kind"] == "begin":
                self.current = message["check"]
                limit = LOAD_SECONDS if self.current == LOADING else self.left[self.current].seconds
                self._deadline = time.monotonic() + limit + _GRACE
            elif message["kind"] == "end":
                self.left.pop(message["check"])
                self._deadline = time.monotonic() + _SLOW_START
            elif message["kind"] == "leaving":
                self._told = True
                continue
            elif message["kind"] in ("done", "unusable"):
                self.current = ""
                if message["kind"] == "unusable":
                    self.left.clear()
            yield message

    def _ended(self, status: int) -> Iterator[dict[str, Any]]:
        """Yield what it means that the child is gone before it was done."""
        if self._dump.is_file() and "Timeout (" in self._dump.read_text(encoding="utf-8", errors="replace"):
            yield from self._overdue()
        elif self.current == LOADING:
            finding = dies(self.current, status, self._dump)
            yield from self._unusable(f"{finding.message}.\n{self._output()}".rstrip(), finding)
        elif self.current in self.left:
            yield from self._incident(dies(self.current, status, self._dump))

    def _overdue(self) -> Iterator[dict[str, Any]]:
        if self.current == LOADING:
            finding = hangs(self.current, LOAD_SECONDS, self._dump)
            yield from self._unusable(
                f"It did not end within {LOAD_SECONDS:.0f} s to import it and to make it.", finding
            )
        elif self.current in self.left:
            yield from self._incident(hangs(self.current, self.left[self.current].seconds, self._dump))

    def _unusable(self, text: str, finding: Any) -> Iterator[dict[str, Any]]:
        self.left.clear()
        place = f'\n  File "{finding.file}", line {finding.line}' if finding.file else ""
        yield {"kind": "unusable", "text": text + place}

    def _incident(self, finding: Any) -> Iterator[dict[str, Any]]:
        check = self.left.pop(self.current)
        if not self._told:
            yield {"kind": "finding", **asdict(finding)}
        if check.first:
            yield {"kind": "blocked", "reason": f"the training step does not run ({finding.id})"}

    def _output(self) -> str:
        """Return the end of what the child printed."""
        text = (self._folder / "output").read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-8:])

    # ---------------------------------------------------------------- end

    def _poll(self) -> int | None:
        if self._process is not None:
            return self._process.poll()
        if self._pid is None:
            return 0
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def _kill(self) -> None:
        """Kill the child and every process of its group: workers, forks, programs that user code started."""
        if self._pid is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        else:
            with suppress(ChildProcessError):
                os.waitpid(self._pid, 0)

    def close(self) -> None:
        """Kill what is left of the child; `start` may be called again."""
        self._kill()
        self._pid = self._process = None
        if self.pipe >= 0:
            os.close(self.pipe)
        self.pipe, self.current = -1, ""

    def remove(self) -> None:
        """End for good: no process and no file is left."""
        self.close()
        for path in self._folder.iterdir():
            path.unlink()
        self._folder.rmdir()

    @property
    def running(self) -> bool:
        """Whether there is a child."""
        return self._pid is not None
