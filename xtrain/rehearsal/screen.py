"""The report for people: one screen of verdicts, each with the user's own line and the corrected one."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

from xtrain.rehearsal.findings import Finding, Report
from xtrain.rehearsal.places import shown, source_line

_INDENT = "         "
_TABLE = 8  # numbers of one table that are shown whole


def screen(report: Report) -> str:
    """Return the text of `report`."""
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    yield f"{report.module}: {_counts(report)}"
    for finding in report.findings:
        yield from _of_finding(finding)
    if report.figures:
        yield ""
        yield from _of_figures(report.figures)
    for skipped in report.skipped:
        yield from _wrapped("not looked at: ", f"{skipped.check}: {skipped.reason}")
    yield f"{report.seconds:.0f} s; what an id means: docs/check.md; --ignore ID silences one"


def _of_finding(finding: Finding) -> Iterator[str]:
    place = f"  {shown(finding.file)}:{finding.line}" if finding.file else ""
    yield ""
    yield f"{finding.severity or '':<8} {finding.id}  {finding.target}{place}"
    line = source_line(finding.file, finding.line)
    if line:
        yield f"{_INDENT}> {line}"
    yield from _wrapped(_INDENT, finding.message)
    if finding.fix:
        yield from _wrapped(f"{_INDENT}Fix:  ", finding.fix)


def _wrapped(head: str, text: str) -> list[str]:
    width = max(60, min(120, shutil.get_terminal_size().columns))
    later = " " * len(head)
    parts = text.splitlines() or [""]
    first, *rest = parts
    lines = textwrap.wrap(first, width, initial_indent=head, subsequent_indent=later, break_long_words=False)
    for part in rest:
        lines += textwrap.wrap(part, width, initial_indent=later, subsequent_indent=later, break_long_words=False)
    return lines


def _counts(report: Report) -> str:
    found = [finding.severity for finding in report.findings]
    errors, warnings = found.count("error"), found.count("warning")
    if not errors and not warnings:
        return (
            "nothing will go wrong, as far as was looked" if not report.failed else "not everything could be looked at"
        )
    return f"{errors} error{'' if errors == 1 else 's'}, {warnings} warning{'' if warnings == 1 else 's'}"


def _of_figures(figures: dict[str, Any]) -> Iterator[str]:
    """Yield single numbers together, and each table on lines of its own."""
    single = {name: value for name, value in figures.items() if not isinstance(value, dict)}
    yield from _wrapped("figures  ", ", ".join(f"{name} {_figure(value)}" for name, value in single.items()))
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _wrapped(f"{_INDENT}{name}: ", _table(value))


def _table(numbers: dict[str, Any]) -> str:
    """Return numbers with their names; of many, the smallest and the largest: `--json` has them all."""
    named = {key: f"{key} {_figure(value)}" for key, value in numbers.items()}
    if len(numbers) <= _TABLE:
        return ", ".join(named.values())
    least, most = (named[end(numbers, key=numbers.__getitem__)] for end in (min, max))
    return f"from {least} to {most} ({len(numbers)} by --json)"


def _figure(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
