"""The wheel, built from the sdist and installed in a new virtual environment, works away from the sources."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent


def run(*command: object, cwd: Path) -> str:
    """Run `command` without what the developer's shell or this test's environment may add to the path."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build sdist and wheel (the wheel from the sdist, so that the sdist is complete, too)."""
    out = tmp_path_factory.mktemp("dist")
    source = out / "source"
    # A build leaves folders beside the sources: it gets a copy.
    ignored = shutil.ignore_patterns(".git", ".venvs", "site", "*.egg-info", "build", "dist", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, ignore=ignored)
    run(sys.executable, "-m", "build", "--outdir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Install the wheel with the torch of this run in a new environment; return its Python."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    torch_pin = f"torch=={torch.__version__.split('+')[0]}"  # an index may lack the part that names the build
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[testing]", "pytest-timeout", torch_pin, cwd=folder)
    return python


def test_wheel_has_every_file_and_nothing_else(wheel):
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "xtrain").rglob("*.py")}
    wanted |= {f"xtrain_{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "backends").rglob("*.py")}
    wanted |= {"xtrain/py.typed", "xtrain_backends/py.typed"}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == wanted


@pytest.mark.timeout(900)
def test_wheel_trains_away_from_the_sources(installed, tmp_path):
    shutil.copy(HERE / "away.py", tmp_path)
    out = run(installed, "away.py", cwd=tmp_path)
    assert out.splitlines()[-1] == "trained away from the sources"
    assert str(ROOT) not in out


def test_command_of_the_wheel(installed, tmp_path):
    assert re.search(r"^cpu +yes", run(installed.with_name("xtrain"), "backends", cwd=tmp_path), re.MULTILINE)


@pytest.mark.timeout(900)
def test_conformance_suite_of_the_wheel(installed, tmp_path):
    shutil.copy(ROOT / "tests" / "backends" / "test_cpu.py", tmp_path)
    out = run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_cpu.py", cwd=tmp_path)
    assert " passed" in out
    assert "skipped" not in out
