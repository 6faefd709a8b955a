"""Which checks exist: entry points of the group ``xtrain.checks``, of this distribution and of others.

[project.entry-points."xtrain.checks"]
wide = "our_package.checks:Wide"
"""

from __future__ import annotations

from pathlib import Path

from xtrain.rehearsal.check import Check
from xtrain.rehearsal.findings import SEVERITIES, Skipped
from xtrain.sources import entry_points, package_of

GROUP = "xtrain.checks"
_TABLE = Path(__file__).resolve().parent / "entry_points.ini"


def all_checks() -> tuple[list[type[Check]], list[Skipped]]:
    """Return the checks, those that others wait for first, and those that cannot be used, with the reason."""
    found: list[type[Check]] = []
    unusable: list[Skipped] = []
    for name, entries in sorted(entry_points(GROUP, _TABLE).items()):
        for entry in entries[1:]:
            unusable.append(Skipped(name, f"{package_of(entry)} offers another check of that name"))
        try:
            found.append(_valid(entries[0].load(), name))
        except Exception as error:  # a package that does not import is about that package alone
            unusable.append(Skipped(name, f"{package_of(entries[0])}: {type(error).__name__}: {error}"))
    return sorted(found, key=lambda check: (not check.first, check.name)), unusable


def load(place: str) -> Check:
    """Return the check at ``module:Class``."""
    module, _, name = place.partition(":")
    check = getattr(__import__(module, fromlist=[name]), name)()
    assert isinstance(check, Check)
    return check


def place_of(check: type[Check]) -> str:
    """Return ``module:Class``."""
    return f"{check.__module__}:{check.__qualname__}"


def _valid(check: object, name: str) -> type[Check]:
    if not (isinstance(check, type) and issubclass(check, Check)):
        raise TypeError(f"Expected a subclass of xtrain.rehearsal.Check. Received: {check!r}.")
    if getattr(check, "name", None) != name:
        raise TypeError(
            f"Expected name = {name!r}, as its entry point says. Received: {getattr(check, 'name', None)!r}."
        )
    if not all(severity in SEVERITIES for severity in check.ids.values()):
        raise TypeError(f"Expected severities out of {SEVERITIES}. Received: {dict(check.ids)}.")
    return check
