"""The names of checkpoints: templates such as ``"{epoch}-{val_loss:.2f}"``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from xtrain.checkpoint.places import Place, place
from xtrain.checkpoint.stores import store_of
from xtrain.errors import ConfigurationError, explain

DEFAULT = "{epoch}-{step}"
_FIELD = r"\{([^{}:]+)(:[^{}]*)?\}"  # name, and how to write it


def fields_of(template: str) -> set[str]:
    """Return the names in a template."""
    return {found[1] for found in re.finditer(_FIELD, template)}


def formatted(template: str, metrics: Mapping[str, Any], insert: bool) -> str:
    """Return a name, without its ending.

    Args:
        template: with fields.
        metrics: values by name; what is missing is 0.
        insert: whether to write ``epoch=3`` for ``{epoch}``.

    Raises:
        ConfigurationError: for a field that cannot be written as it says.
    """

    def written(found: re.Match[str]) -> str:
        name, spec = found[1], found[2] or ""
        value = metrics.get(name, 0)
        value = float(value) if spec.endswith(("f", "e", "g")) else int(value) if spec.endswith("d") else value
        try:
            text = format(value, spec.removeprefix(":"))
        except ValueError as error:
            fix = "ModelCheckpoint(filename='{epoch}-{val_loss:.2f}')"
            raise ConfigurationError(
                explain("a filename whose fields are numbers", f"{found[0]}: {error}", fix)
            ) from error
        return f"{name}={text}" if insert else text

    return re.sub(_FIELD, written, template).replace("/", "_")


def free(trainer: Any, folder: str, name: str, counts: bool = True) -> Place:
    """Return where to save, the same on every rank.

    Args:
        trainer: of the run.
        folder: of checkpoints.
        name: with its ending.
        counts: whether to take the first free name after it, if there is something already.
    """
    path = place(folder) / name
    store, number, stem = store_of(path), 1, path.stem
    with suppress(OSError):  # it will be told when that is written to
        while counts and trainer.is_global_zero and store.taken(path):
            path, number = path.with_name(f"{stem}-v{number}{path.suffix}"), number + 1
    return place(trainer.broadcast(str(path)))
