"""Run the project's checks, each in the virtual environment it needs, with nothing but Python installed.

    python ci/run.py                    everything
    python ci/run.py --leg lint         one leg, or all of a backend (--leg tpu); may be repeated
    python ci/run.py --list [--json]    the names of the legs

It begins by saying how long it will take, and what this machine cannot test. Environments are made in
``.venvs/`` (or ``$XTRAIN_VENVS``) on first use and renewed when the project's metadata changes. A leg fails if
it cannot be installed, runs no test, skips one, or fails one.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from legs import ENVIRONMENTS, HARDWARE, LEGS, VARIABLES, Hardware, Leg

ROOT = Path(__file__).resolve().parent.parent
BIN = "Scripts" if os.name == "nt" else "bin"
INSTALL_MINUTES = 4  # of an environment, on a usual line; torch and its companions are large


@dataclass
class Result:
    """What came of a leg: `problem` is empty if all is well; counts are of tests."""

    leg: str
    problem: str = ""
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0


def main() -> int:
    options = _parse()
    if options.list:
        print(json.dumps(_everything()) if options.json else "\n".join(_everything()))
        return 0
    names = list(itertools.chain.from_iterable(options.leg or [_everything()]))
    print(_announcement(names), flush=True)
    results = [_timed(name) for name in names]
    print(_summary(results))
    return int(any(result.problem for result in results))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the project's checks.")
    parser.add_argument("--leg", action="append", type=_named, help="run this leg, or this backend's; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the names of the legs and stop")
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    return parser.parse_args()


def _named(text: str) -> list[str]:
    """Return the leg `text`, or the legs whose first part it is.

    Raises:
        argparse.ArgumentTypeError: if there is none.
    """
    found = [name for name in LEGS if name == text or name.startswith(f"{text}-")]
    if not found:
        raise argparse.ArgumentTypeError(f"no leg {text!r}; the legs are {', '.join(LEGS)}")
    return [text] if text in found else found


def _everything() -> list[str]:
    """Return the legs that this machine has the hardware for."""
    return [name for name, leg in LEGS.items() if not leg.needs or _is_here(HARDWARE[leg.needs])]


def _is_here(hardware: Hardware) -> bool:
    return any(Path(device).exists() for device in hardware.devices)


def _announcement(names: Sequence[str]) -> str:
    """Return how long the legs `names` will take, and what cannot be tested here whatever is run."""
    minutes = sum(LEGS[name].usual for name in names)
    missing = [e for e in dict.fromkeys(LEGS[name].environment for name in names) if not _is_current(e)]
    text = f"{len(names)} leg{'s' * (len(names) != 1)}, about {max(1, round(minutes))} min on two free cores"
    if missing:
        text += f"; before that about {INSTALL_MINUTES * len(missing)} min to install {' and '.join(missing)}"
    absent = [f"No {name} here, so not tested: {h.untested}." for name, h in HARDWARE.items() if not _is_here(h)]
    return "\n".join([f"{text}.", *absent])


def _timed(name: str) -> Result:
    print(f"\n======== {name} ========", flush=True)
    start = time.monotonic()
    result = _run_leg(name, LEGS[name])
    result.seconds = time.monotonic() - start
    return result


def _run_leg(name: str, leg: Leg) -> Result:
    result = Result(name)
    folder = _environment(leg.environment)
    if folder is None:
        result.problem = "not installed"
        return result
    deadline = time.monotonic() + 60 * leg.minutes
    for command in leg.commands:
        if _call(command, folder, leg, deadline):
            result.problem = f"{result.problem} {' '.join(command)}".strip()
    if leg.tests:
        _run_tests(leg, folder, deadline, result)
    return result


def _run_tests(leg: Leg, folder: Path, deadline: float, result: Result) -> None:
    files = [str(path.relative_to(ROOT)) for pattern in leg.tests for path in sorted(ROOT.glob(pattern))]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        options = (f"--junitxml={report}", "--durations=5", *leg.arguments)
        command = ["python", "-m", "pytest", *options, *(files or leg.tests)]
        status = _call(command, folder, leg, deadline)
        _count(report, result)
    if status:
        result.problem = f"pytest exit {status}"
    elif result.skipped:
        result.problem = "skipped tests"
    elif not result.passed:
        result.problem = "no report"  # the process ended itself with status 0


def _count(report: Path, result: Result) -> None:
    """Add the tests of a JUnit `report`; there is none if the run was killed."""
    for suite in ElementTree.parse(report).iter("testsuite") if report.exists() else ():
        tests, errors, failures, skipped = (int(suite.get(k, 0)) for k in ("tests", "errors", "failures", "skipped"))
        result.failed += errors + failures
        result.skipped += skipped
        result.passed += tests - errors - failures - skipped


def _call(command: Sequence[str], folder: Path, leg: Leg, deadline: float) -> int:
    """Run `command` of the environment in `folder` from the root, output unbuffered; return its status."""
    print("$", *command, flush=True)
    program = str(folder / BIN / command[0])
    path = f"{folder / BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    env = {**os.environ, **VARIABLES, **leg.variables, "PATH": path, "VIRTUAL_ENV": str(folder)}
    seconds = max(1.0, deadline - time.monotonic())
    try:
        run = subprocess.run([program, *command[1:]], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, timeout=seconds)
    except subprocess.TimeoutExpired:
        print(f"stopped: the leg may take {leg.minutes} minutes", flush=True)
        return 124
    return run.returncode


def _environment(name: str) -> Path | None:
    """Return the folder of environment `name`, made or renewed if need be; None if pip failed."""
    folder, wanted = _folder(name), ENVIRONMENTS[name]
    if _is_current(name):
        return folder
    print(f"installing {name}: {', '.join(wanted.pins)}", flush=True)
    venv.create(folder, with_pip=True)
    project = f"{ROOT}[{','.join(wanted.extras)}]"
    pip = [str(folder / BIN / "python"), "-m", "pip", "install", "--quiet", *wanted.pins, "-e", project]
    if subprocess.run(pip, cwd=ROOT, stdin=subprocess.DEVNULL).returncode:
        return None
    (folder / "installed").write_text(_digest(name))
    return folder


def _folder(name: str) -> Path:
    return Path(os.environ.get("XTRAIN_VENVS", ROOT / ".venvs")).resolve() / name


def _is_current(name: str) -> bool:
    """Return whether environment `name` was made from today's metadata."""
    stamp = _folder(name) / "installed"
    return stamp.exists() and stamp.read_text() == _digest(name)


def _digest(name: str) -> str:
    digest = hashlib.sha256(repr((ROOT, ENVIRONMENTS[name], sys.version)).encode())
    for source in (ROOT / "pyproject.toml", ROOT / "backends" / "entry_points.ini"):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _summary(results: Sequence[Result]) -> str:
    """Return a table of the legs, and a last line with the number of tests."""
    lines = ["", f"{'leg':<32}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}  result"]
    for r in results:
        lines.append(f"{r.leg:<32}{r.passed:>8}{r.failed:>8}{r.skipped:>9}{r.seconds:>9.0f}  {r.problem or 'ok'}")
    passed, skipped = sum(r.passed for r in results), sum(r.skipped for r in results)
    # A leg that fails without a failed test (lint, install, crash) counts as one failure.
    failed = sum(r.failed or bool(r.problem) for r in results)
    return "\n".join([*lines, "", f"{passed} passed, {failed} failed, {skipped} skipped"])


if __name__ == "__main__":
    sys.exit(main())
