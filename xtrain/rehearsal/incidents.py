"""What user code does to the process it runs in: hangs, crashes, ends it, forks it, asks questions, raises."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from xtrain.rehearsal.findings import Finding, Severity
from xtrain.rehearsal.places import NOWHERE, Place, place_in_stack

IDS: dict[str, Severity] = {
    "XT-RUN-01": "error",  # it does not come to an end
    "XT-RUN-02": "error",  # it kills the process
    "XT-RUN-03": "error",  # it ends the process
    "XT-RUN-04": "error",  # it forks
    "XT-RUN-05": "error",  # it asks for input
    "XT-RUN-06": "error",  # it raises
}


def hangs(check: str, seconds: float, dump: Path) -> Finding:
    """Return the finding that user code did not end in time, at the line where it was."""
    place = place_in_dump(dump)
    text = f"this did not end within {seconds:.0f} s, the time limit of the check {check!r}"
    return Finding("XT-RUN-01", text, "a time limit of its own, or --ignore XT-RUN-01", *place)


def dies(check: str, status: int, dump: Path) -> Finding:
    """Return the finding that the process died, by its exit status: negative for a signal."""
    place = place_in_dump(dump)
    if status >= 0:
        text = f"the process ended with status {status} while the check {check!r} ran"
        return Finding("XT-RUN-03", text, "raise an error: who trains on several processes waits for this one", *place)
    name = signal.Signals(-status).name
    return Finding("XT-RUN-02", f"the process was killed by {name} while the check {check!r} ran", "", *place)


def exits(place: Place) -> Finding:
    """Return the finding that user code calls ``sys.exit`` or ``os._exit``."""
    text = "this ends the process in the middle of a training; the others of a run wait for it"
    return Finding("XT-RUN-03", text, "self.trainer.should_stop = True", *place)


def forks(place: Place) -> Finding:
    """Return the finding that a copy of the process goes on with the training."""
    text = "this makes a second process that goes on with the same training, and with the same devices"
    return Finding("XT-RUN-04", text, "subprocess.run([...]), or a DataLoader with num_workers", *place)


def asks(place: Place) -> Finding:
    """Return the finding that user code reads from a terminal, which no cluster has."""
    return Finding("XT-RUN-05", "this asks for input, and nobody answers in a job", "an argument of __init__", *place)


def raises(error: BaseException, place: Place) -> Finding:
    """Return the finding that user code raises."""
    text = f"{type(error).__name__}: {error}".split("\nFix:")[0]
    fix = str(error).partition("\nFix:")[2].strip()
    return Finding("XT-RUN-06", text, fix, *place)


def incident(error: BaseException, place: Place) -> Finding:
    """Return the finding for an exception that left the user's code."""
    if isinstance(error, SystemExit):
        return exits(place)
    return asks(place) if isinstance(error, EOFError) else raises(error, place)


def place_in_dump(dump: Path) -> Place:
    """Return the innermost line of the user's code in what `faulthandler` wrote; the main thread is its last."""
    text = dump.read_text(encoding="utf-8", errors="replace") if dump.is_file() else ""
    threads = re.split(r"^(?:Current thread|Thread) .*$", text, flags=re.MULTILINE)
    return next((place for thread in reversed(threads) if (place := place_in_stack(thread)).line), NOWHERE)
