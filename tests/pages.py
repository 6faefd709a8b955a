"""What README and pages consist of: blocks of code that run, and tables that are generated."""

from __future__ import annotations

import re
from pathlib import Path

from xtrain.tables import render_matrix, render_rules

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TABLES = {"matrix": render_matrix, "rules": render_rules}
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """Return ``(line, code)`` of the page's blocks in `language`; `line` is where the code begins."""
    text = path.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(3)) + 1, m[3]) for m in _BLOCK.finditer(text) if m[2] == language]


def snippet(path: str, section: str) -> str:
    """Return the lines of a file between ``--8<-- [start:section]`` and its end, as the site includes them.

    Raises:
        ValueError: if the file has no such section.
    """
    text = (ROOT / path).read_text(encoding="utf-8")
    _, start, rest = text.partition(f"# --8<-- [start:{section}]\n")
    lines, end, _ = rest.partition(f"# --8<-- [end:{section}]")
    if not (start and end):
        raise ValueError(f"no section {section!r} in {path}")
    return lines.rstrip(" ")


def execute(path: Path, module: str) -> None:
    """Run the ``python`` blocks of a page in one namespace; tracebacks name the page's lines.

    Args:
        path: the page.
        module: the name that classes of the page get as their module.
    """
    namespace = {"__name__": module}
    for line, code in blocks(path, "python"):
        exec(compile("\n" * (line - 1) + code, str(path), "exec"), namespace)


def with_current_tables(text: str) -> str:
    """Return `text` with the tables of ``xtrain backends`` between their markers, where it has them."""
    for name, render in TABLES.items():
        start, end = f"<!-- table:{name} -->", f"<!-- /table:{name} -->"
        before, found, rest = text.partition(start)
        if found:
            text = f"{before}{start}\n\n{render()}\n\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    for page in (README, *PAGES):
        page.write_text(with_current_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
