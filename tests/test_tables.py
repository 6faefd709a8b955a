"""The tables of the pages and of ``xtrain backends`` say what capabilities and rules say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import xtrain
from xtrain.cli import main
from xtrain.columns import columns
from xtrain.precision import PRECISIONS
from xtrain.registry import get_backend_class, registered_backends
from xtrain.rules import all_rules
from xtrain.tables import matrix_rows, render_availability, render_matrix, render_rules

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


def test_command_prints_the_tables_as_wide_as_the_terminal(capsys, monkeypatch):
    for width in (200, 60):
        monkeypatch.setenv("COLUMNS", str(width))
        assert main(["backends"]) == 0
        out = capsys.readouterr().out
        rows = {line.split("  ")[0]: line.split()[1:] for line in out.split("On this machine")[0].splitlines()[4:]}
        assert {name.split(",")[0] for name in rows if name} == {
            r[0] for r in (n[0].split(", ") for n in matrix_rows())
        }
        assert [rows["cpu"]] == [row[1:] for row in matrix_rows() if row[0] == "cpu"]
        assert max(map(len, out.splitlines())) <= max(width, 80)


def test_command_shows_one_backend_with_its_options(capsys):
    assert main(["backends", "deepspeed"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^offload_optimizer +str \| Mapping", out, re.MULTILINE)
    assert "stage:" in out
    assert main(["backends", "cpus"]) == 1
    assert "Fix:  Trainer(backend='cpu')" in capsys.readouterr().err


def test_command_shows_rules(capsys):
    assert main(["rules"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^\[([\w-]+)\]", out, re.MULTILINE) == [row[0].strip("`") for row in cells(render_rules())]
    assert main(["rules", "cpu"]) == 0
    assert len(capsys.readouterr().out) < len(out)


def test_doctor_names_versions_devices_and_what_is_missing(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^torch +{re.escape(torch.__version__)}", out, re.MULTILINE)
    assert re.search(r"^processor +\w+, \d+ cores", out, re.MULTILINE)
    assert "launcher   python" in out
    assert re.search(r"^cpu +yes$", out, re.MULTILINE)


def test_module_is_the_command():
    run = subprocess.run([sys.executable, "-m", "xtrain", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == f"xtrain {xtrain.__version__}\n"


def test_columns_share_a_narrow_terminal():
    table = columns(["a", "b"], [["x", "word " * 12], ["long name", "y"]], width=40)
    assert table.splitlines() == [
        "a          b",
        "---------  -----------------------------",
        "x          word word word word word word",
        "           word word word word word word",
        "long name  y",
    ]


def test_command_is_installed():
    script = Path(sys.executable).with_name("xtrain")
    run = subprocess.run([script, "backends"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "On this machine" in run.stdout


@pytest.mark.parametrize("words", [["rules"], ["backends"], ["doctor"]])
def test_a_reader_that_leaves_is_no_error(words):
    command = subprocess.Popen(
        [sys.executable, "-m", "xtrain", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    command.stdout.close()
    assert command.stderr.read() == ""
    assert command.wait() == 0
    command.stderr.close()
