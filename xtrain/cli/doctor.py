"""What ``xtrain doctor`` finds out. Nothing is started, and no package but torch is imported."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata

import torch

import xtrain
from xtrain.errors import XTrainError
from xtrain.launch.join import current_launch
from xtrain.registry import registered_backends

_GIGABYTE = 10**9
_OTHERS = ("lightning", "pytorch-lightning", "torchmetrics", "jsonargparse", "rich")


def versions() -> list[list[str]]:
    """Return package and version of what a run depends on; what is not installed is said."""
    rows = [["python", f"{platform.python_version()} ({sys.executable})"]]
    rows += [["xtrain", f"{xtrain.__version__} ({os.path.dirname(xtrain.__file__)})"]]  # noqa: PTH120  # as imported
    rows += [["torch", torch.__version__]]
    names = {*registered_backends(), "torch_xla", *_extras()} - {"torch"}
    found = {name: _version(name) for name in [*sorted(names), *_OTHERS]}
    return rows + [[name, version] for name, version in found.items() if version]


def _extras() -> Iterator[str]:
    """Yield the packages that the extras of this distribution name."""
    try:
        requirements = metadata.requires("xtrain-torch") or []
    except metadata.PackageNotFoundError:
        return
    for requirement in requirements:
        yield requirement.split(";")[0].strip().split("[")[0].rstrip("<>=!~.0123456789*, ")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def devices() -> Iterator[list[str]]:
    """Yield the processor and the accelerators that torch sees."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield [
        "processor",
        f"{platform.machine()}, {cores} cores for this process, {torch.get_num_threads()} threads of torch",
    ]
    if not torch.accelerator.is_available():
        yield ["accelerator", "torch sees none"]
        return
    kind = torch.accelerator.current_accelerator()
    for index in range(torch.accelerator.device_count()):
        facts = getattr(torch, str(kind)).get_device_properties(index)
        memory = getattr(facts, "total_memory", 0) / _GIGABYTE
        yield [f"{kind}:{index}", f"{facts.name}, {memory:.1f} GB"]


def processes() -> Iterator[list[str]]:
    """Yield what started this process, as a Trainer would read it."""
    try:
        launch = current_launch()
    except XTrainError as error:
        yield ["launcher", str(error)]
        return
    yield ["launcher", launch.launcher]
    yield ["processes", f"{launch.world_size}, this is rank {launch.rank}"]
    yield from ([name, source] for name, source in launch.sources.items())
    yield from (["warning", text] for text in launch.warnings)
