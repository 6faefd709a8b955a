"""Killed and told to end, for real: a few of what ``ci/bench/crash.py`` does hundreds of times."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "ci" / "bench"))

from crash import strikes


def check(place, kind, times, extra=()):
    counts = strikes(place, kind, times, 3, list(extra))
    assert counts[kind] >= times
    assert {name: count for name, count in counts.items() if name.isupper()} == {}


@pytest.mark.parametrize("kind", ["kill", "signal"])
def test_two_processes(kind):
    check("cpu-2p", kind, 2)


def test_loader_workers_and_validation():
    """The whole process group is told, workers included."""
    check("cpu", "signal", 2, ("--workers", "2", "--validate"))


@pytest.mark.parametrize("place", ["zero2-2p", "tpu"])
def test_engines(place):
    if importlib.util.find_spec("torch_xla" if place == "tpu" else "deepspeed"):
        check(place, "kill", 1)
        check(place, "signal", 1)
