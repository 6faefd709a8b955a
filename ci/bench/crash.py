"""Does a training survive being killed, and being told to end, at any moment?

    python ci/bench/crash.py kill --place cpu --times 240      # SIGKILL at random moments
    python ci/bench/crash.py signal --place cpu --times 20     # SIGTERM and SIGUSR1 instead

Places: cpu, cpu-2p, zero2-2p, tpu (``PJRT_DEVICE=CPU``). A training of 64 steps (`tests/resume/survivor.py`), which
saves every other one, is struck again and again, and goes on with ``ckpt_path="last"``; from time to time one is left
alone to its end. Counted are torn checkpoints (a finished name that does not verify), announced ones that are lost, and
ends that differ, bit by bit, from the run that nobody struck. On *cpu* the trainings are forks of a process that has
imported everything, so that a kill takes tenths of a second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "resume" / "survivor.py"
sys.path[:0] = [str(ROOT), str(SCRIPT.parent)]

from xtrain.checkpoint.format import Checkpoint, checkpoints_in  # noqa: E402
from xtrain.errors import CheckpointError  # noqa: E402

STEPS, TRIES = 64, 6
PLACES = {
    "cpu": ([], {}),
    "cpu-2p": (["--devices", "2"], {}),
    "zero2-2p": (["--backend", "deepspeed", "--stage", "2", "--devices", "2"], {"DS_ACCELERATOR": "cpu"}),
    "tpu": (["--backend", "tpu"], {"PJRT_DEVICE": "CPU"}),
}


class Training:
    """One process of the training, and those it starts; its output goes to a file."""

    def __init__(self, place: str, folder: Path, output: Path, extra: list[str], fork: bool) -> None:
        arguments, variables = PLACES[place]
        words = [str(folder), "--steps", str(STEPS), *arguments, *extra]
        self.output, self.processes = output, 2 if "--devices" in arguments else 1
        output.write_text("")
        self.started: subprocess.Popen[bytes] | None = None
        if fork:
            self.pid = os.fork()
            if self.pid == 0:
                _run_here(words, output)
        else:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
            with output.open("w") as file:
                self.started = subprocess.Popen(
                    [sys.executable, str(SCRIPT), *words], stdout=file, stderr=subprocess.STDOUT, env=environment,
                    start_new_session=True,
                )  # fmt: skip
            self.pid = self.started.pid
        self.status: int | None = None

    def poll(self) -> int | None:
        """Return the exit status once there is one; negative after a signal."""
        if self.status is None and self.started is not None:
            self.status = self.started.poll()
        elif self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def wait_for_start(self, seconds: float = 120.0) -> None:
        """Wait until every process has come to its fit, or for the end."""
        limit = time.monotonic() + seconds
        while self.output.read_text().count("started") < self.processes and self.poll() is None:
            if time.monotonic() > limit:
                raise TimeoutError(self.output.read_text()[-2000:])
            time.sleep(0.005)

    def wait_for_end(self, seconds: float = 120.0) -> int:
        limit = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > limit:
                raise TimeoutError(self.output.read_text()[-2000:])
            time.sleep(0.01)
        assert self.status is not None
        return self.status

    def family(self) -> list[int]:
        """Return this process and its children, which have sessions of their own."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [self.pid, *(int(pid) for pid in children.read_text().split())] if children.exists() else [self.pid]

    def strike(self, number: int, only: int | None = None) -> None:
        """Send a signal to the whole family, or to one of it."""
        family = self.family()
        for pid in family if only is None else family[only : only + 1]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _run_here(words: list[str], output: Path) -> None:
    """Run the script in this process, a fork, and end it."""
    os.setsid()
    number = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(number, 1)
    os.dup2(number, 2)
    import survivor

    sys.argv = ["survivor.py", *words]
    status = 1
    try:
        survivor.main()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException as error:  # the parent reads it
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        sys.stdout.flush()
        os._exit(status)


def announced(text: str) -> int:
    """Return the last step that was said to be saved."""
    return max([0, *(int(step) for step in re.findall(r"saved .*step=(\d+)", text))])


def digest(text: str) -> str | None:
    found = re.search(r"done \d+ (\w+)", text)
    return None if found is None else found[1]


def torn_in(folder: Path) -> Iterator[str]:
    for path in folder.glob("*.ckpt"):
        if not path.is_symlink():
            try:
                Checkpoint(path).verify()
            except (CheckpointError, OSError) as error:
                yield f"{path.name}: {error}"


def strikes(place: str, kind: str, times: int, seed: int, extra: list[str]) -> Counter[str]:
    """Strike a training so many times; return what was counted."""
    chance, counts, fork = random.Random(seed), Counter(), place == "cpu" and "--workers" not in extra
    if fork:
        import survivor  # noqa: F401  # once, for all forks
    base = Path(tempfile.mkdtemp(prefix="xtrain-crash-"))
    whole = Training(place, base / "whole", base / "whole.txt", extra, fork)
    began = time.monotonic()
    whole.wait_for_start()
    start = time.monotonic() - began
    whole.wait_for_end()
    length = time.monotonic() - began - start
    expected = digest(whole.output.read_text())
    assert expected is not None, whole.output.read_text()[-3000:]
    print(f"{place}: {STEPS} steps take {length:.1f} s, after {start:.1f} s of start", flush=True)
    number = 0
    while counts[kind] < times:
        folder, number = base / f"run{number}", number + 1
        for _ in range(TRIES):
            _once(place, kind, folder, base, length, chance, counts, extra, fork)
            if counts[kind] >= times or counts["ended before the strike"] > 10 * times:
                break
        last = Training(place, folder, base / "last.txt", extra, fork)
        last.wait_for_end()
        counts["runs to the end"] += 1
        if digest(last.output.read_text()) != expected:
            counts["ENDS THAT DIFFER"] += 1
            print(last.output.read_text()[-1500:], flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        print(f"  {counts[kind]} of {times}: {dict(counts)}", flush=True)
    shutil.rmtree(base, ignore_errors=True)
    return counts


def _once(
    place: str, kind: str, folder: Path, base: Path, length: float, chance: random.Random, counts: Counter[str],
    extra: list[str], fork: bool,
) -> None:  # fmt: skip
    training = Training(place, folder, base / "now.txt", extra, fork)
    training.wait_for_start()
    reached = max([0, *(int(c.summary["global_step"]) for c in checkpoints_in(folder))])
    time.sleep(chance.random() * length * (1 - reached / STEPS))
    if training.poll() is not None:
        counts["ended before the strike"] += 1
        return
    if kind == "kill":
        training.strike(signal.SIGKILL)
        training.wait_for_end()
        counts["kill"] += 1
    else:
        _tell(training, folder, chance, counts)
    for problem in torn_in(folder):
        counts["TORN"] += 1
        print("torn:", problem, flush=True)
    newest = max([0, *(int(c.summary["global_step"]) for c in checkpoints_in(folder))])
    if newest < announced(training.output.read_text()):
        counts["LOST"] += 1
        print("lost:", training.output.read_text()[-500:], sorted(p.name for p in folder.iterdir()), flush=True)


def _tell(training: Training, folder: Path, chance: random.Random, counts: Counter[str]) -> None:
    number = chance.choice((signal.SIGTERM, signal.SIGUSR1))
    family = training.family()
    training.strike(number, chance.choice((None, *range(len(family)))))
    status = training.wait_for_end()
    if digest(training.output.read_text()) is not None:
        counts["ended before the strike"] += 1
        return
    alone = f"was killed by {signal.Signals(number).name}" in training.output.read_text()  # one of several processes
    if (status == -number or alone) and not any(folder.glob("*.ckpt")):
        counts["outside of the fit"] += 1  # the interpreter starts or ends: nothing is lost, nothing handles it
        return
    counts["signal"] += 1
    note = folder / "preempted.json"
    if status != 75 or not note.is_file():
        counts["NOT PREEMPTED"] += 1
        print(f"status {status}, {number}:", training.output.read_text()[-2500:], flush=True)
        return
    name = json.loads(note.read_text())["checkpoint"]
    Checkpoint(folder / name).verify()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("kill", "signal"))
    parser.add_argument("--place", choices=PLACES, default="cpu")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--extra", default="", help="more arguments of survivor.py: '--workers 2 --validate'")
    options = parser.parse_args()
    counts = strikes(options.place, options.kind, options.times, options.seed, options.extra.split())
    bad = {name: count for name, count in counts.items() if name.isupper()}
    print(f"{options.kind} on {options.place}: {dict(counts)}", "FAILED" if bad else "ok", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
