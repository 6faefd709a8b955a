"""Each recipe has its page: a picture that is there, lines that are in the file, and a command for each backend."""

from __future__ import annotations

import re

import pytest
from pages import snippet
from recipes import ROOT, SHORT

from xtrain.precision import PRECISIONS

PAGES = ROOT / "docs" / "recipes"


def test_there_is_a_page_for_each_recipe():
    assert {page.stem for page in PAGES.glob("*.md")} >= set(SHORT)


@pytest.mark.parametrize("name", SHORT)
def test_page(name):
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    pictures = [PAGES / path for path in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)]
    assert pictures
    assert all(picture.stat().st_size < 100_000 for picture in pictures)
    shown = [snippet(path, section) for path, section in re.findall(r'^--8<-- "([^:"]+):(\w+)"$', text, re.MULTILINE)]
    assert any("def training_step(" in lines for lines in shown)
    assert sum(len(lines.splitlines()) for lines in shown) <= 60
    for what in ("--backend cuda", "--backend tpu", "--backend deepspeed", "torchrun", "accelerate launch", "| TPU |"):
        assert what in text
    assert re.search(r"\| fp16\b.*\|", text)
    assert "| ZeRO" in text
    assert set(re.findall(r"--precision ([\w-]+)", text)) <= set(PRECISIONS)


def test_a_section_that_is_missing_is_noticed():
    with pytest.raises(ValueError, match="no section 'nothing' in"):
        snippet("examples/gan.py", "nothing")
