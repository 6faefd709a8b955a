"""The pages of the site are run: their code executes, their tables and pictures are current, what they name exists."""

import re

import pytest
from pages import PAGES, README, ROOT, TABLES, blocks, execute, with_current_tables

import xtrain
from xtrain.tables import render_rules

RUNNABLE = [page for page in PAGES if blocks(page, "python")]
TEXTS = {page: page.read_text(encoding="utf-8") for page in (README, ROOT / "CONTRIBUTING.md", *PAGES)}


def by_name(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.relative_to(ROOT).as_posix())


@by_name(RUNNABLE)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    execute(page, __name__)


def test_the_pages_with_steps_are_among_them():
    assert {"guide", "recipes", "logging", "precision", "trouble", "moving", "writing-a-backend", "refused"} <= {
        page.stem for page in RUNNABLE
    }


@by_name([page for page in PAGES if blocks(page, "py")])
def test_fragments_are_python(page):
    for line, code in blocks(page, "py"):
        compile("\n" * (line - 1) + code, str(page), "exec")


def test_tables_are_those_of_the_command_line():
    stale = [page.name for page in PAGES if with_current_tables(TEXTS[page]) != TEXTS[page]]
    assert stale == [], "python tests/pages.py writes the current tables into the pages"
    assert all(any(f"<!-- table:{name} -->" in TEXTS[page] for page in PAGES) for name in TABLES)


def test_references_of_the_rules_are_pages():
    wanted = set(re.findall(r"\| (docs/\S+) \|", render_rules()))
    assert wanted
    assert [page for page in wanted if not (ROOT / page).exists()] == []


def test_extras_exist():
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    named = {
        extra
        for text in TEXTS.values()
        for some in re.findall(r"pip install (?:-e )?'(?:xtrain-torch|\.)\[([\w,]+)\]", text)
        for extra in some.split(",")
    }
    assert {"examples", "bench", "deepspeed", "tpu", "loggers", "testing", "docs"} <= named <= extras
    # The name `xtrain` on the public index is another project.
    assert [page.name for page, text in TEXTS.items() if re.search(r"pip install '?xtrain(?!-torch)\b", text)] == []


@by_name([ROOT / "CONTRIBUTING.md", *PAGES])
def test_scripts_exist(page):
    scripts = set(re.findall(r"(?<![\w/.])(?:examples|ci|tests)/[\w/]+\.py", TEXTS[page]))
    assert [script for script in scripts if not (ROOT / script).exists()] == []


def test_every_leg_of_the_contributing_page_exists():
    from test_ci import LEGS

    named = re.findall(r"--leg ([\w-]+)", TEXTS[ROOT / "CONTRIBUTING.md"])
    assert len(named) > 10
    assert [leg for leg in named if not any(name == leg or name.startswith(f"{leg}-") for name in LEGS)] == []


def test_every_public_name_has_its_place_in_the_api_pages():
    shown = "\n".join(text for page, text in TEXTS.items() if page.parent.name == "api")
    alone = [name for name in xtrain.__all__ if f"::: xtrain.{name}\n" in f"{shown}\n"]
    whole = {module for module in re.findall(r"^::: (\S+)$", shown, re.MULTILINE) if module not in alone}
    homes = {name: getattr(xtrain, name).__module__ for name in xtrain.__all__ if name not in alone}
    assert {n: home for n, home in homes.items() if not any(f"{home}.".startswith(f"{m}.") for m in whole)} == {}


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {page.relative_to(ROOT / "docs").as_posix() for page in PAGES} == listed
