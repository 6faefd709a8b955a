"""Runs a function of a test file in a process of its own: some state (a started runtime, a mesh) cannot be undone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

_CODE = "import importlib, json, sys; f = getattr(importlib.import_module(sys.argv[1]), sys.argv[2]); "
_CODE += "print('RESULT', json.dumps(f(*json.loads(sys.argv[3]))))"


def fresh(function: Callable[..., Any], *arguments: Any, timeout: int = 250, **variables: str | None) -> Any:
    """Return what `function`, given by name to a new interpreter, returns there as JSON.

    Args:
        function: at the top of a test file.
        *arguments: go through JSON, too.
        timeout: seconds.
        **variables: environment on top of this process's; None removes one.
    """
    done = fresh_process(function, *arguments, timeout=timeout, **variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def fresh_process(
    function: Callable[..., Any], *arguments: Any, timeout: int = 250, **variables: str | None
) -> subprocess.CompletedProcess[str]:
    """Do the same, but return the finished process, whatever came of it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
    command = [sys.executable, "-c", _CODE, function.__module__, function.__name__, json.dumps(arguments)]
    wanted = {name: value for name, value in environment.items() if value is not None}
    return subprocess.run(command, env=wanted, capture_output=True, text=True, timeout=timeout)
