"""A script beside an editable clone that is called `xtrain`: the folder of the clone must not win."""

import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = (
    "import xtrain_backends.cpu, xtrain\nprint(xtrain.Trainer.__module__, xtrain.__file__, xtrain_backends.__file__)\n"
)


def run(*command: object, cwd: Path) -> str:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a clone `xtrain`, installed editable in the environment `venv` beside it, and a script."""
    folder = tmp_path_factory.mktemp("home")
    ignored = shutil.ignore_patterns(".git", ".venvs", "site", "*.egg-info", "build", "dist", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder / "xtrain", ignore=ignored)
    (folder / "train.py").write_text(SCRIPT, encoding="utf-8")
    venv.create(folder / "venv", with_pip=True)
    (packages,) = (folder / "venv").rglob("site-packages")
    (packages / "torch_of_this_run.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
    run(python(folder), "-m", "pip", "install", "--quiet", "--no-deps", "-e", folder / "xtrain", cwd=folder)
    return folder


def python(home: Path) -> Path:
    return home / "venv" / ("Scripts" if os.name == "nt" else "bin") / Path(sys.executable).name


@pytest.mark.parametrize("arguments", [["train.py"], ["-c", SCRIPT]])
def test_a_script_beside_the_clone_imports_the_library(home, arguments):
    module, ours, backends = run(python(home), *arguments, cwd=home).split()
    assert module == "xtrain.trainer"
    assert Path(ours) == home / "xtrain" / "xtrain" / "__init__.py"
    assert Path(backends) == home / "xtrain" / "backends" / "__init__.py"


def test_an_uninstall_leaves_nothing(home):
    run(python(home), "-m", "pip", "uninstall", "--quiet", "--yes", "xtrain-torch", cwd=home)
    assert list((home / "venv").rglob("*xtrain*")) == []
