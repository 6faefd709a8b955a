"""A release is only made if tag, package, citation and changelog agree."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import xtrain

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def project(tmp_path):
    """A copy of what the check reads; returns a function that dates the newest changes and checks a tag."""
    for name in ("ci/release.py", "xtrain/__init__.py", "CITATION.cff", "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)

    def check(tag: str, date: str = "2026-12-01") -> tuple[int, str]:
        changes = tmp_path / "CHANGELOG.md"
        changes.write_text(re.sub(r"^(## \d\S*) .*$", rf"\1 ({date})", changes.read_text(), count=1, flags=re.M))
        done = subprocess.run([sys.executable, "ci/release.py", tag], cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout

    return check


def test_this_version_can_be_released(project):
    assert project(f"v{xtrain.__version__}") == (0, "")


def test_another_tag_is_refused_with_every_place(project):
    status, said = project("v9.9.9")
    assert status == 1
    assert said.count(f"Received: {xtrain.__version__}.") == 3
    assert said.count("Expected version 9.9.9 in ") == 3


def test_a_changelog_without_a_date_is_refused(project):
    status, said = project(f"v{xtrain.__version__}", "not released yet")
    assert (status, said) == (1, f"Expected version {xtrain.__version__} in CHANGELOG.md. Received: none.\n")
