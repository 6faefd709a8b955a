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


def test_two_processes():
    check("cpu-2p", "kill", 2)


def test_loader_workers_and_validation():
    """The whole process group is told, workers included."""
    check("cpu", "signal", 2, ("--workers", "2", "--validate"))


@pytest.mark.parametrize(("place", "kind"), [("zero2-2p", "signal"), ("tpu", "kill")])
def test_engines(place, kind):
    if importlib.util.find_spec("torch_xla" if place == "tpu" else "deepspeed"):
        check(place, kind, 1, ("--pause", "0.1") if kind == "signal" else ())
