"""The command ``xtrain``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TextIO

from xtrain.compat.imports import complete
from xtrain.errors import XTrainError
from xtrain.tables import render_availability, render_matrix, render_rules

complete(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 1 after an error of xtrain's own.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(sys.stdout)
    except XTrainError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="xtrain", description="One training step, every device.")
    commands = parser.add_subparsers(title="commands", required=True)
    backends = commands.add_parser("backends", help="what each backend can do, here and in general")
    backends.set_defaults(run=_backends)
    return parser


def _backends(out: TextIO) -> None:
    sections = {
        "Backends and precisions": render_matrix(),
        "On this machine": render_availability(),
        "Refused combinations": render_rules(),
    }
    print("\n\n".join(f"{title}\n\n{table}" for title, table in sections.items()), file=out)
