"""The tables users read: printed by ``xtrain backends``, and as GitHub markdown in README and docs.

They are rendered from what the Trainer obeys (capabilities and rules), so they cannot say anything else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from xtrain.contract import Backend
from xtrain.errors import BackendContractError, XTrainError
from xtrain.precision import PRECISIONS
from xtrain.registry import get_backend_class, registered_backends, rejected_entry_points
from xtrain.rules import all_rules

YES = "yes"
NO = "-"


def render_matrix() -> str:
    """Return which backend takes which precision: one row per backend, aliases together."""
    return _markdown(["`backend=`", *map(_code, PRECISIONS)], _with_code(matrix_rows()))


def render_rules() -> str:
    """Return the refused combinations: one row per rule, those of the backends last."""
    rules = all_rules(cls for _, cls in importable_backends())
    rows = [[rule.id, rule.combination, rule.reason, rule.fix, rule.reference] for rule in rules]
    return _markdown(["rule", "refused", "because", "instead", "see"], _with_code(rows))


def render_availability() -> str:
    """Return whether each backend can run on this machine, and if not, what to do about it."""
    return _markdown(["`backend=`", "on this machine"], _with_code(availability_rows()))


def matrix_rows() -> list[list[str]]:
    """Return names and, for every precision, whether the backend takes it."""
    return [
        [names, *(YES if precision in cls.capabilities.precisions else NO for precision in PRECISIONS)]
        for names, cls in importable_backends()
    ]


def availability_rows() -> list[list[str]]:
    """Return names and whether the backend runs here."""
    rows = [[names, _availability(aliases[0])] for names, aliases in _grouped_names()]
    return rows + [[name, f"broken: {reason}"] for name, reason in rejected_entry_points().items()]


def _grouped_names() -> list[tuple[str, list[str]]]:
    """Return ``(shown, names)`` for each registered class."""
    by_place: dict[str, list[str]] = {}
    for name, place in registered_backends().items():
        by_place.setdefault(place, []).append(name)
    return [(", ".join(names), names) for names in by_place.values()]


def importable_backends() -> list[tuple[str, type[Backend]]]:
    """Return ``(shown names, class)`` of the backends whose module can be imported here."""
    found = []
    for shown, names in _grouped_names():
        try:
            found.append((shown, get_backend_class(names[0])))
        except XTrainError:
            continue  # `render_availability` tells what to install, or what is broken
    return found


def _availability(name: str) -> str:
    try:
        return get_backend_class(name).available() or YES
    except BackendContractError as error:
        return f"broken: {error}"
    except XTrainError as error:
        return str(error)
    except (Exception, SystemExit) as error:  # what another package's `available` does is about its row alone
        return f"broken: {type(error).__name__}: {error}"


def _with_code(rows: Iterable[Sequence[str]]) -> list[list[str]]:
    """Return `rows` with the names of the first column, which a comma separates, as code."""
    return [[", ".join(map(_code, first.split(", "))), *rest] for first, *rest in rows]


def _code(name: str) -> str:
    return f"`{name}`"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([_cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Return `text` as one table cell: a pipe or a line break would end it."""
    return " ".join(text.split()).replace("|", "\\|")
