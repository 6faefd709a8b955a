"""The tables of the pages and of ``xtrain backends`` say what capabilities and rules say."""

import re
import subprocess
import sys
from pathlib import Path

from xtrain.cli import main
from xtrain.precision import PRECISIONS
from xtrain.registry import get_backend_class, registered_backends
from xtrain.rules import all_rules
from xtrain.tables import render_availability, render_matrix, render_rules

ROOT = Path(__file__).resolve().parent.parent


def cells(table: str) -> list[list[str]]:
    """Return the rows of a markdown table without header and rule."""
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()[2:]]


def test_matrix_agrees_with_the_capabilities():
    rows = {name.strip("`"): row[1:] for row in cells(render_matrix()) for name in row[0].split(", ")}
    assert rows.keys() == registered_backends().keys()
    for name, row in rows.items():
        supported = get_backend_class(name).capabilities.precisions
        assert row == ["yes" if precision in supported else "-" for precision in PRECISIONS]


def test_rules_are_all_there_in_order():
    rules = all_rules({get_backend_class(name): None for name in registered_backends()})
    assert [row[0].strip("`") for row in cells(render_rules())] == [rule.id for rule in rules]
    assert all(len(row) == 5 and all(row) for row in cells(render_rules()))


def test_availability_repeats_what_the_backend_says():
    rows = {row[0].split(", ")[0].strip("`"): row[1] for row in cells(render_availability())}
    for name, said in rows.items():
        reason = get_backend_class(name).available()
        assert said == ("yes" if reason is None else " ".join(reason.split()))


def test_missing_dependency_is_a_row_not_a_crash(tmp_path, monkeypatch):
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\nProvides-Extra: chip\n")
    (info / "entry_points.txt").write_text("[xtrain.backends]\nchip = acme_absent_chip:Chip\n")
    (tmp_path / "acme_absent_chip.py").write_text("import absent_package")
    monkeypatch.syspath_prepend(tmp_path)
    assert "`chip`" not in render_matrix()
    assert "pip install 'acme[chip]'" in dict(cells(render_availability()))["`chip`"]


def test_command_prints_the_tables(capsys):
    assert main(["backends"]) == 0
    out = capsys.readouterr().out
    assert render_matrix() in out
    assert render_availability() in out
    assert render_rules() in out


def test_command_is_installed():
    script = Path(sys.executable).with_name("xtrain")
    run = subprocess.run([script, "backends"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert render_matrix() in run.stdout
