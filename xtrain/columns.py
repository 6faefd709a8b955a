"""Tables for people: aligned columns, as wide as the terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest

_GAP = "  "
_NARROWEST = 12  # the names of backends are not broken


def columns(header: Sequence[str], rows: Iterable[Sequence[str]], width: int | None = None) -> str:
    """Return a table with aligned columns; cells that do not fit are broken into several lines.

    Args:
        header: the titles of the columns.
        rows: the cells, as many per row as there are titles.
        width: of the whole table, in characters; default: that of the terminal.
    """
    table = [list(header), *(list(row) for row in rows)]
    room = (width or shutil.get_terminal_size((100, 24)).columns) - len(_GAP) * (len(header) - 1)
    wanted = [max(len(row[i]) for row in table) for i in range(len(header))]
    widths = _shrink(wanted, max(room, _NARROWEST * len(header)))
    table.insert(1, ["-" * n for n in widths])
    return "\n".join(line for row in table for line in _lines(row, widths))


def _shrink(wanted: Sequence[int], room: int) -> list[int]:
    """Return column widths that fit into `room`: the widest columns give way first."""
    widths = list(wanted)
    while sum(widths) > room:
        widest = widths.index(max(widths))
        second = max((w for i, w in enumerate(widths) if i != widest), default=0)
        least = max(second - 1 if second < widths[widest] else widths[widest] - 1, _NARROWEST)
        widths[widest] = max(least, widths[widest] - (sum(widths) - room))
        if widths[widest] == _NARROWEST and max(widths) == _NARROWEST:
            break
    return widths


def _lines(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    cells = [textwrap.wrap(text, width) or [""] for text, width in zip(row, widths, strict=True)]
    return [
        _GAP.join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip()
        for parts in zip_longest(*cells, fillvalue="")
    ]
