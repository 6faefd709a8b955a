"""``xtrain check``: its options, and those of pyproject.toml; the rehearsal itself is in `xtrain.rehearsal`."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xtrain.errors import ConfigurationError, explain

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_ID = re.compile(r"[A-Z]+(-[A-Z]+)+-\d+")


def add_check(commands: Any) -> None:
    """Add the command to a parser's `commands`."""
    check = commands.add_parser("check", help="rehearse a module on the CPU: what the expensive machine will do")
    check.add_argument("module", help="model.py:GAN, or a script that calls Trainer.fit (its arguments: after --)")
    check.add_argument("--for", "--backend", dest="targets", default="", metavar="LIST",
                       help="backends, precisions and 'processes', with commas; default: all")  # fmt: skip
    check.add_argument("--data", default="", metavar="FILE.py:NAME", help="a loader, a DataModule, or a function")
    check.add_argument("--batch", default="", metavar="SPEC", help='random batches: "64x3x32x32,64:int"')
    check.add_argument("--init", action="append", default=[], metavar="KEY=VALUE",
                       help="an argument of the class, or a configuration file; may be repeated")  # fmt: skip
    check.add_argument("--devices", type=_count, help="of the machine that it is meant for")
    check.add_argument("--memory", type=_bytes, help="of each device: 80GB")
    check.add_argument("--steps", type=_count, default=4, help="training steps of a check (4)")
    check.add_argument("--ignore", action="append", default=[], metavar="ID", help="leave a finding out")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.set_defaults(run=_check, status_of_errors=2)


def without_script_arguments(arguments: Sequence[str] | None) -> tuple[list[str], tuple[str, ...]]:
    """Return the command line, and what follows ``--`` in one of ``xtrain check``: arguments of the script."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] != ["check"] or "--" not in given:
        return given, ()
    end = given.index("--")
    return given[:end], tuple(given[end + 1 :])


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1, not {text!r}")
    return int(text)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"a size such as 80GB or 16GiB, not {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _check(options: argparse.Namespace) -> Iterator[str | int]:
    from xtrain.rehearsal import Settings, rehearse
    from xtrain.rehearsal.subject import Source

    settings = Settings(
        targets=tuple(name.strip() for name in options.targets.split(",") if name.strip()),
        steps=options.steps,
        devices=options.devices,
        memory=options.memory,
        ignore=_checked_ids([*options.ignore, *ignored_here()]),
    )
    source = Source(options.module, options.data, options.batch, tuple(options.init), options.script_arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # children are ended on the way out
    try:
        report = rehearse(source, settings)
    except KeyboardInterrupt:
        print("interrupted; nothing is left running", file=sys.stderr)
        yield 128 + signal.SIGINT
        return
    yield report.as_json() if options.json else str(report)
    yield report.status


def _checked_ids(ids: list[str]) -> tuple[str, ...]:
    for id in ids:
        if not _ID.fullmatch(id):
            raise ConfigurationError(explain("the id of a finding", repr(id), "--ignore XT-PROTOCOL-10"))
    return tuple(ids)


def ignored_here() -> list[str]:
    """Return ``[tool.xtrain.check] ignore`` of the pyproject.toml of this folder, or the nearest above.

    Raises:
        ConfigurationError: if the file cannot be read, or the value is no list of ids.
    """
    here = Path.cwd()
    file = next(
        (folder / "pyproject.toml" for folder in (here, *here.parents) if (folder / "pyproject.toml").is_file()), None
    )
    if file is None or "tool.xtrain" not in file.read_text(encoding="utf-8"):
        return []
    reader = _toml_reader(file)
    try:
        found = reader.loads(file.read_text(encoding="utf-8"))["tool"]["xtrain"].get("check", {}).get("ignore", [])
    except (ValueError, KeyError) as error:
        raise ConfigurationError(
            explain(f"{os.fspath(file)} as TOML", str(error), "[tool.xtrain.check]\nignore = []")
        ) from error
    if not isinstance(found, list) or not all(isinstance(id, str) for id in found):
        fix = '[tool.xtrain.check]\nignore = ["XT-PROTOCOL-10"]'
        raise ConfigurationError(explain(f"a list of ids in {os.fspath(file)}", repr(found), fix))
    return found


def _toml_reader(file: Path) -> Any:
    for name in ("tomllib", "tomli"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    received = f"Python {sys.version_info.major}.{sys.version_info.minor}, which has no tomllib"
    raise ConfigurationError(
        explain(f"a reader of TOML for {os.fspath(file)}", received, "pip install tomli, or --ignore ID")
    )
