"""``xtrain inspect`` and ``xtrain export``: what a checkpoint holds, and its weights for programs without xtrain."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtrain.checkpoint.finding import read_checkpoint
from xtrain.checkpoint.format import Checkpoint, checkpoints_in, is_checkpoint
from xtrain.checkpoint.weights import masters_of
from xtrain.errors import CheckpointError, MissingDependencyError, explain


def rows_of(path: Path) -> Iterator[tuple[str, str]]:
    """Yield facts about a checkpoint, as a person wants to read them.

    Args:
        path: a checkpoint, or a folder with some, of which the newest is taken.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    inside = [] if is_checkpoint(path) else checkpoints_in(path)
    opened = inside[0] if inside else Checkpoint(path)
    opened.verify()
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


def export(path: Path, target: Path) -> int:
    """Write the weights of a checkpoint as one file of safetensors; returns the number of tensors.

    Tied weights, which that format does not know, are written under each of their names. What was trained in a lower
    precision from fp32 copies is written from these.

    Args:
        path: a checkpoint of xtrain, or a file of Lightning 2.
        target: the file.

    Raises:
        MissingDependencyError: without the safetensors package.
        CheckpointError: for a damaged checkpoint, or one without tensors.
    """
    if find_spec("safetensors") is None:
        fix = "pip install 'xtrain-torch[export]'"
        raise MissingDependencyError(explain("the package safetensors, which xtrain export writes with", "none", fix))
    from safetensors.torch import save_file

    checkpoint = read_checkpoint(path).checkpoint
    weights = {**checkpoint["state_dict"], **masters_of(checkpoint)}
    tensors = {name: _plain(value) for name, value in weights.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(explain("tensors to export", f"{path} with none", "xtrain inspect to see what it holds"))
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.new")
    save_file(tensors, draft, metadata={"format": "pt"})
    draft.replace(target)
    return len(tensors)


def _plain(tensor: Tensor) -> Tensor:
    dense = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    return dense.detach().contiguous().clone()
