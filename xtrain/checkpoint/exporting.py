"""``xtrain inspect`` and ``xtrain export``: what a checkpoint holds, and its weights for programs without xtrain."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtrain.checkpoint.finding import open_checkpoint, read_checkpoint
from xtrain.checkpoint.format import Checkpoint
from xtrain.checkpoint.places import place
from xtrain.checkpoint.weights import masters_of
from xtrain.errors import CheckpointError, ConfigurationError, MissingDependencyError, explain


def rows_of(path: str) -> Iterator[tuple[str, str]]:
    """Yield facts about a checkpoint, as a person wants to read them.

    Args:
        path: a checkpoint, or a folder with some, of which the newest is taken; also a URL of fsspec.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    opened = open_checkpoint(path)
    if not isinstance(opened, Checkpoint):
        opened = Checkpoint(opened)  # which says that a file is none
    summary = dict(opened.summary)
    yield "checkpoint", str(opened.path)
    yield "written", datetime.fromtimestamp(opened.created / 1e9, tz=timezone.utc).isoformat(" ", "seconds")
    optimizers: dict[str, Any] = summary.pop("optimizers", {})
    versions: dict[str, str] = summary.pop("versions", {})
    for name, value in summary.items():
        yield name.replace("_", " "), f"{value:,}" if name == "parameters" else str(value)
    for name, facts in optimizers.items():
        yield f"optimizer {name}", f"{facts['class']}, {facts['steps']} steps"
    yield "versions", ", ".join(f"{package} {version}" for package, version in versions.items())
    for name, facts in opened.files.items():
        yield name, f"{int(facts['bytes']):,} bytes"


def export(path: str | os.PathLike[str], target: str | os.PathLike[str]) -> int:
    """Write the weights of a checkpoint as one file of safetensors; returns the number of tensors.

    Tied weights, which that format does not know, are written under each of their names. What was trained in a lower
    precision from fp32 copies is written from these.

    Args:
        path: a checkpoint of xtrain, or a file of Lightning 2; also a URL of fsspec.
        target: the file, on this machine.

    Raises:
        MissingDependencyError: without the safetensors package.
        CheckpointError: for a damaged checkpoint, or one without tensors.
        ConfigurationError: for a `target` that is a URL.
    """
    file = place(target)
    if not isinstance(file, Path):
        raise ConfigurationError(explain("a file of this machine to export to", f"{file}", "--out model.safetensors"))
    if find_spec("safetensors") is None:
        fix = "pip install 'xtrain-torch[export]'"
        raise MissingDependencyError(explain("the package safetensors, which xtrain export writes with", "none", fix))
    from safetensors.torch import save_file

    checkpoint = read_checkpoint(open_checkpoint(path)).checkpoint
    weights = {**checkpoint["state_dict"], **masters_of(checkpoint)}
    tensors = {name: _plain(value) for name, value in weights.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(explain("tensors to export", f"{path} with none", "xtrain inspect to see what it holds"))
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.new")
    save_file(tensors, draft, metadata={"format": "pt"})
    draft.replace(file)
    return len(tensors)


def _plain(tensor: Tensor) -> Tensor:
    dense = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    return dense.detach().contiguous().clone()
