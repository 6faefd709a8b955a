"""The README is run: its GAN trains, its tables are the ones the Trainer obeys, its links and scripts exist."""

import re

from pages import README, ROOT, blocks, execute, with_current_tables

TEXT = README.read_text(encoding="utf-8")


def test_the_gan_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    execute(README, __name__)
    assert "Epoch 2/2: 58/58" in capsys.readouterr().err


def test_the_gan_has_at_most_40_lines():
    ((_, code),) = blocks(README, "python")
    assert "self.automatic_optimization = False" in code
    assert len([line for line in code.splitlines() if line.strip()]) <= 40


def test_it_is_read_in_one_go():
    assert len(TEXT.splitlines()) <= 130


def test_the_matrix_is_that_of_the_command_line():
    assert "<!-- table:matrix -->" in TEXT
    assert with_current_tables(TEXT) == TEXT, "python tests/pages.py writes the current tables into the pages"


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", TEXT)
    files = [(link or image).split("#")[0] for link, image in targets if "://" not in link]
    assert len(files) > 20
    assert [target for target in files if target and not (ROOT / target).exists()] == []


def test_scripts_exist():
    scripts = set(re.findall(r"(?<![\w/.])(?:examples|ci|tests)/[\w/]+\.py", TEXT))
    assert {"examples/gan.py", "ci/run.py"} <= scripts
    assert [script for script in scripts if not (ROOT / script).exists()] == []


def test_the_check_of_the_readme_is_the_one_that_is_run_here():
    commands = [line for _, code in blocks(README, "bash") for line in code.splitlines()]
    assert "python3 ci/run.py" in commands
    assert "python3 ci/run.py" in (ROOT / ".ci" / "run").read_text()
