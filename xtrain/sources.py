"""Where names of backends come from: entry points of installed packages, and the table of a checkout."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from configparser import ConfigParser
from functools import cache
from importlib import metadata
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from xtrain.errors import explain

GROUP = "xtrain.backends"
RESERVED = frozenset({"auto"})  # a spelling of Trainer(backend=...), no backend
DISTRIBUTION = "xtrain-torch"  # "xtrain" on the public index is another project
_BUILT_IN = "xtrain_backends"
_CHECKOUT = Path(__file__).resolve().parent.parent / "backends"
_TABLE = _CHECKOUT / "entry_points.ini"


def entry_points(group: str = GROUP, table: Path | None = None) -> dict[str, list[metadata.EntryPoint]]:
    """Return the entry points by name, a built-in one first: an installed package cannot take its name over.

    Args:
        group: of the entry points.
        table: those of a checkout; default: that of the backends.
    """
    installed = metadata.entry_points(group=group)
    built_in = _checkout_entry_points(group, table or _TABLE) or [entry for entry in installed if is_built_in(entry)]
    foreign = [entry for entry in installed if not is_built_in(entry)]
    found: dict[str, list[metadata.EntryPoint]] = {}
    for entry in [*built_in, *foreign]:
        found.setdefault(entry.name, []).append(entry)
    return found


def is_built_in(entry: metadata.EntryPoint) -> bool:
    """Whether `entry` is in a checkout's table, or this distribution brings it: any package can name our modules."""
    return entry.dist is None or entry.dist.name.lower().replace("_", "-") == DISTRIBUTION


def contested(entries: Sequence[metadata.EntryPoint]) -> bool:
    """Whether no one of `entries`, which have the same name, may be used."""
    foreign = not is_built_in(entries[0])
    return foreign and (len(entries) > 1 or entries[0].name in RESERVED or entries[0].name != entries[0].name.lower())


def package_of(entry: metadata.EntryPoint) -> str:
    """Return the distribution that brings `entry`, with its version."""
    return f"{DISTRIBUTION} (a checkout)" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"


@cache
def warn_of_namesake() -> None:
    """Say that another project of this import name is installed: whichever came last has overwritten the other."""
    try:
        version = metadata.version("xtrain")
    except metadata.PackageNotFoundError:
        return
    expected, received = f"{DISTRIBUTION} alone to be imported as xtrain", f"xtrain {version}, another project, too"
    fix = f"pip uninstall xtrain && pip install --force-reinstall --no-deps {DISTRIBUTION}"
    warnings.warn(explain(expected, received, fix), stacklevel=4)


def _checkout_entry_points(group: str, path: Path) -> list[metadata.EntryPoint]:
    table = ConfigParser(delimiters=["="])
    if not table.read(path, encoding="utf-8"):
        return []
    return [metadata.EntryPoint(name, value, group) for name, value in table[group].items()]


def _adopt_checkout() -> None:
    """Make a checkout's folder ``backends`` importable under the name an install gives it."""
    if not _TABLE.is_file() or _BUILT_IN in sys.modules:
        return
    spec = spec_from_file_location(_BUILT_IN, _CHECKOUT / "__init__.py", submodule_search_locations=[str(_CHECKOUT)])
    assert spec is not None  # a path ending in .py always has a loader
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[_BUILT_IN] = module
    spec.loader.exec_module(module)


def taken(name: str, entries: Sequence[metadata.EntryPoint]) -> str:
    """Return what is wrong with `entries`, which cannot all have `name`."""
    packages = [package_of(entry) for entry in entries]
    fix = f"pip uninstall {packages[-1].split()[0]}"
    if len(entries) == 1:
        return explain("a lower-case name other than 'auto' for a backend", f"{name!r} of {packages[0]}", fix)
    return explain(f"one package that offers backend {name!r}", " and ".join(packages), fix)


_adopt_checkout()
