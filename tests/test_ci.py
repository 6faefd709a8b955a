"""The runner: which outcome makes a leg fail, and that no test file is left out of the legs."""

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "ci"))

from legs import CONFORMANCE, ENVIRONMENTS, HARDWARE, LEGS  # noqa: E402


def test_every_test_file_belongs_to_a_leg():
    claimed = {path for leg in LEGS.values() for pattern in leg.tests for path in ROOT.glob(pattern)}
    assert sorted(set((ROOT / "tests").rglob("test_*.py")) - claimed) == []


@pytest.mark.parametrize("name", LEGS)
def test_leg_names_what_exists(name):
    leg = LEGS[name]
    assert leg.environment in ENVIRONMENTS
    assert leg.tests or leg.commands
    assert all(list(ROOT.glob(pattern)) for pattern in leg.tests)


@pytest.mark.parametrize("row", CONFORMANCE, ids=lambda row: row.tests)
def test_every_precision_of_a_suite_has_its_leg(row, monkeypatch):
    monkeypatch.setenv("PJRT_DEVICE", "CPU")  # a test file sets it
    found = runpy.run_path(str(ROOT / row.tests)).values()
    suites = [s for s in found if isinstance(s, type) and s.__module__ == "<run_path>" and hasattr(s, "precisions")]
    assert suites
    assert {precision for suite in suites for precision in suite.precisions} == set(row.precisions)
    for suite in suites:  # the tests that are about no precision run with the first
        assert suite.precisions[0] == row.precisions[0]


SUITE = """
import pytest

class TestSuite:
    precisions = ("32-true", "16-mixed")

    @pytest.mark.parametrize("precision", precisions)
    def test_by_precision(self, precision):
        pass

    def test_once(self):
        pass

def test_outside_of_a_suite():
    pass
"""


@pytest.mark.parametrize(
    ("precision", "line"),
    [
        ("32-true", "3 passed, 1 deselected"),
        ("16-mixed", "2 passed, 2 deselected"),
        ("8", "1 passed, 3 deselected"),
    ],
)
def test_a_leg_runs_its_precision_only(precision, line, tmp_path):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--precision={precision}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}  # where the project is not installed
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert line in done.stdout


def test_extras_of_the_environments_are_in_the_metadata():
    metadata = (ROOT / "pyproject.toml").read_text()
    for environment in ENVIRONMENTS.values():
        assert all(re.search(rf"^{extra} = \[", metadata, re.MULTILINE) for extra in environment.extras)


def test_list_feeds_a_matrix():
    run = subprocess.run([sys.executable, "ci/run.py", "--list", "--json"], cwd=ROOT, capture_output=True, check=True)
    assert set(json.loads(run.stdout)) >= {name for name, leg in LEGS.items() if not leg.needs}


def test_every_python_of_the_metadata_is_tested_by_the_hosted_checks():
    promised = set(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text()))
    hosted = set(re.findall(r'"(3\.\d+)"', (ROOT / ".github" / "workflows" / "ci.yml").read_text()))
    assert promised == hosted
    assert f'requires-python = ">={min(promised, key=lambda v: int(v[2:]))}"' in (ROOT / "pyproject.toml").read_text()


def test_a_leg_for_hardware_is_part_of_everything_where_that_is(monkeypatch, tmp_path):
    import run

    device = tmp_path / "nvidia0"
    monkeypatch.setitem(run.HARDWARE, "GPU", replace(HARDWARE["GPU"], devices=(str(device),)))
    assert [name for name, leg in LEGS.items() if leg.needs == "GPU"] == ["gpu"]
    assert "gpu" not in run._everything()
    assert "No GPU here, so not tested: CUDA's kernels" in run._announcement(["lint"])
    device.touch()
    assert "gpu" in run._everything()
    assert "No GPU" not in run._announcement(["lint"])


def test_the_announcement_counts_what_is_to_come(monkeypatch, tmp_path):
    import run

    monkeypatch.setenv("XTRAIN_VENVS", str(tmp_path))
    some = ["core", "tpu-32-true-1p"]
    usual = round(sum(LEGS[name].usual for name in some))
    text = run._announcement(some)
    assert text.startswith(f"2 legs, about {usual} min on two free cores; before that about 8 min to install light and")
    (tmp_path / "light").mkdir()
    (tmp_path / "light" / "installed").write_text(run._digest("light"))
    assert "before that about 4 min to install full." in run._announcement(some)
    assert run._announcement(["lint"]).startswith("1 leg, about 1 min on two free cores.\n")


@pytest.mark.parametrize("text", ["lint", "tpu", "cpu", "core", "bf16-true", "tp"])
def test_a_leg_or_the_legs_of_a_backend_are_run(text):
    import run

    if text in ("bf16-true", "tp"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"no leg '{text}'; the legs are lint, core, "):
            run._named(text)
    elif text in LEGS:
        assert run._named(text) == [text]
    else:
        backend = [name for row in CONFORMANCE if row.backend == text for name in row.legs()]
        assert set(backend) <= set(run._named(text))
        assert all(name.startswith(f"{text}-") for name in run._named(text))


@pytest.fixture
def small_project(tmp_path):
    """A project with the real runner, one leg, and an environment that needs no download; returns its runner."""
    (tmp_path / "ci").mkdir()
    shutil.copy(ROOT / "ci" / "run.py", tmp_path / "ci")
    legs = (ROOT / "ci" / "legs.py").read_text()
    table = (
        'ENVIRONMENTS = {"light": Environment((), ())}\nLEGS = {"one": Leg("light", tests=("test_*.py",), minutes=1)}\n'
    )
    (tmp_path / "ci" / "legs.py").write_text(f"{legs}\n{table}")
    (tmp_path / "backends").mkdir()
    (tmp_path / "backends" / "entry_points.ini").write_text("")
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    # The environment is the one of this test, entered under the name that the runner looks for.
    binaries = tmp_path / "venvs" / "light" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (binaries / "python").chmod(0o755)

    def run(test: str | None) -> tuple[int, str]:
        if test is not None:
            (tmp_path / "test_it.py").write_text(test)
        code = "import sys; sys.path.insert(0, 'ci'); sys.argv[0] = 'ci/run.py'; import run, pathlib\n"
        code += f"run._environment = lambda name: pathlib.Path({str(binaries.parent)!r})\nsys.exit(run.main())"
        env = {**os.environ, "PYTEST_ADDOPTS": "-p no:cacheprovider"}
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env)
        assert done.stdout.startswith("1 leg, about 1 min")
        return done.returncode, done.stdout.splitlines()[-1]

    return run


OUTCOMES = {
    "passes": ("def test_a(): pass", 0, "1 passed, 0 failed, 0 skipped"),
    "fails": ("def test_a(): pass\ndef test_b(): assert 0\ndef test_c(): assert 0", 1, "1 passed, 2 failed, 0 skipped"),
    "skips": ("import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip('no')", 1, "1 passed, 1 failed, 1 skipped"),
    "is stopped": (
        "import pytest\ndef test_a(): pass\ndef test_b(): pytest.exit('no', 7)",
        1,
        "1 passed, 1 failed, 0 skipped",
    ),
    "collects nothing": ("def helper(): pass", 1, "0 passed, 1 failed, 0 skipped"),
    "has no file": (None, 1, "0 passed, 1 failed, 0 skipped"),
    "dies": ("import os\ndef test_a(): os._exit(0)", 1, "0 passed, 1 failed, 0 skipped"),
}


@pytest.mark.parametrize(("test", "status", "line"), OUTCOMES.values(), ids=OUTCOMES)
def test_outcome_of_a_leg(small_project, test, status, line):
    assert small_project(test) == (status, line)
