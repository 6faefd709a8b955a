"""The command ``xtrain``: what backends can do, what is refused, what this machine lacks, what checkpoints hold."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields

import xtrain
from xtrain.cli.rehearsal import add_check, without_script_arguments
from xtrain.columns import columns
from xtrain.contract import Backend
from xtrain.errors import XTrainError
from xtrain.precision import PRECISIONS
from xtrain.registry import get_backend_class
from xtrain.rules import all_rules
from xtrain.tables import availability_rows, importable_backends, matrix_rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 1 after an error of xtrain's own; ``check`` has its own.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.
    """
    arguments, script_arguments = without_script_arguments(arguments)
    options = _parser().parse_args(arguments)
    options.script_arguments = script_arguments
    try:
        for part in options.run(options):
            if isinstance(part, int):
                return part
            print(part)
        sys.stdout.flush()
    except BrokenPipeError:  # `xtrain rules | head` has seen enough; at its exit Python would complain once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except XTrainError as error:
        print(error, file=sys.stderr)
        return int(options.status_of_errors)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="xtrain", description="One training step, every device.")
    parser.add_argument("--version", action="version", version=f"xtrain {xtrain.__version__}")
    parser.set_defaults(status_of_errors=1)
    commands = parser.add_subparsers(title="commands", required=True)
    add_check(commands)
    backends = commands.add_parser("backends", help="what each backend can do, in general and here")
    backends.add_argument("name", nargs="?", help="one backend, with its options")
    backends.set_defaults(run=_backends)
    rules = commands.add_parser("rules", help="combinations that are refused, and what to do instead")
    rules.add_argument("name", nargs="?", help="those of one backend")
    rules.set_defaults(run=_rules)
    doctor = commands.add_parser("doctor", help="versions, devices, and what would make each backend run")
    doctor.set_defaults(run=_doctor)
    inspect_ = commands.add_parser("inspect", help="what a checkpoint holds, and whether it is whole")
    inspect_.add_argument("checkpoint", help="the folder, or one with checkpoints, of which the newest is taken")
    inspect_.set_defaults(run=_inspect)
    export = commands.add_parser("export", help="write the weights of a checkpoint as safetensors")
    export.add_argument("checkpoint", help="the folder, or a file of Lightning 2")
    export.add_argument("--out", required=True, metavar="FILE", help="model.safetensors")
    export.set_defaults(run=_export)
    return parser


# ---------------------------------------------------------------- backends


def _backends(options: argparse.Namespace) -> Iterator[str]:
    if options.name is not None:
        yield from _one_backend(options.name)
        return
    yield "Backends and precisions\n"
    yield columns(["backend", *PRECISIONS], matrix_rows())
    yield "\nOn this machine\n"
    yield columns(["backend", "runs here"], availability_rows())
    yield "\n`xtrain backends NAME` shows the options of one, `xtrain rules` what is refused."


def _one_backend(name: str) -> Iterator[str]:
    cls = get_backend_class(name)
    can = cls.capabilities
    yield f"{name}: {(inspect.getdoc(cls) or '').splitlines()[0]}\n"
    facts = {
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "runs here": cls.available() or "yes",
        "precisions": ", ".join(p for p in PRECISIONS if p in can.precisions),
        **{f.name.replace("_", " "): "yes" if getattr(can, f.name) else "no" for f in fields(can)[1:]},
    }
    yield columns(["fact", "value"], list(facts.items()))
    yield f"\nOptions: Trainer(backend={name!r}, backend_options={{...}})\n"
    yield from _options(cls)
    yield f"\n`xtrain rules {name}` shows what is refused."


def _options(cls: type[Backend]) -> Iterator[str]:
    parameters = inspect.signature(cls).parameters.values()
    rows = [[p.name, str(p.annotation), repr(p.default)] for p in parameters if p.kind is not p.VAR_KEYWORD]
    yield columns(["option", "type", "default"], rows) if rows else "none"
    described = inspect.getdoc(cls) or ""
    if rows and "Args:" in described:
        yield "\n" + described[described.index("Args:") :].split("\n\n")[0]


# ---------------------------------------------------------------- rules


def _rules(options: argparse.Namespace) -> Iterator[str]:
    chosen = [get_backend_class(options.name)] if options.name else [cls for _, cls in importable_backends()]
    for rule in all_rules(chosen):
        parts = [f"[{rule.id}] {rule.combination}", rule.reason, f"Fix:  {rule.fix}", f"See:  {rule.reference}"]
        yield "\n     ".join(parts)


# ---------------------------------------------------------------- doctor


def _doctor(options: argparse.Namespace) -> Iterator[str]:
    from xtrain.cli.doctor import devices, processes, versions

    yield "Versions\n"
    yield columns(["package", "version"], versions())
    yield "\nDevices\n"
    yield columns(["device", "what"], devices())
    yield "\nProcesses\n"
    yield columns(["fact", "value"], processes())
    yield "\nBackends\n"
    yield columns(["backend", "runs here, or what would make it run"], availability_rows())


# ---------------------------------------------------------------- checkpoints


def _inspect(options: argparse.Namespace) -> Iterator[str]:
    from xtrain.checkpoint.exporting import rows_of

    yield columns(["fact", "value"], list(rows_of(options.checkpoint)))


def _export(options: argparse.Namespace) -> Iterator[str]:
    from xtrain.checkpoint.exporting import export

    count = export(options.checkpoint, options.out)
    yield f"{options.out}: {count} tensors"
