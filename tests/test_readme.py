"""The README is run: its code executes, its tables are the ones the Trainer obeys, its links and extras exist."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from xtrain.tables import render_matrix, render_rules

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", TEXT, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]


def test_code_blocks_run_in_order(tmp_path):
    script = tmp_path / "readme.py"
    script.write_text("\n\n".join(PYTHON), encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "error", str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Epoch 2/2") >= 1  # the first GAN
    assert done.stderr.count("Epoch 1/1") >= 2  # the one under a loss scale, and the one on the new backend


def test_the_gan_has_at_most_40_lines():
    assert "self.automatic_optimization = False" in PYTHON[0]
    assert len([line for line in PYTHON[0].splitlines() if line.strip()]) <= 40


def with_current_tables(text: str) -> str:
    """Return `text` with the tables of ``xtrain backends`` between their markers."""
    for name, render in (("matrix", render_matrix), ("rules", render_rules)):
        start, end = f"<!-- table:{name} -->", f"<!-- /table:{name} -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n{render()}\n{end}{rest.partition(end)[2]}"
    return text


def test_tables_are_those_of_the_command_line():
    assert with_current_tables(TEXT) == TEXT, "python tests/test_readme.py writes the current tables into the README"


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)]+)\)", TEXT)
    files = [target.split("#")[0] for target in targets if "://" not in target]
    assert [target for target in files if target and not (ROOT / target).exists()] == []
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", TEXT, re.M)
    }
    assert {target[1:] for target in targets if target.startswith("#")} <= anchors


def test_references_of_the_rules_are_sections():
    sections = {title.lower() for title in re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)}
    wanted = {section.lower() for section in re.findall(r"\| README, ([^|]+?) \|", render_rules())}
    assert wanted
    assert wanted <= sections


def test_extras_exist():
    wanted = {
        extra
        for extras in re.findall(r"pip install (?:-e )?'(?:xtrain|\.)\[([\w,]+)\]", TEXT)
        for extra in extras.split(",")
    }
    assert wanted >= {"examples", "bench"}
    assert wanted <= set(metadata.metadata("xtrain").get_all("Provides-Extra"))


def test_scripts_exist():
    scripts = set(re.findall(r"(?<![\w/.])(?:examples|ci|tests)/[\w/]+\.py", TEXT))
    assert {"examples/gan.py", "ci/run.py", "ci/bench/overhead.py"} <= scripts
    assert [script for script in scripts if not (ROOT / script).exists()] == []


if __name__ == "__main__":
    (ROOT / "README.md").write_text(with_current_tables(TEXT), encoding="utf-8")
