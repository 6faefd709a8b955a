"""A rehearsal of what is in memory, for `Trainer.check` and `xtrain.testing.rehearse`."""

from __future__ import annotations

import os
from typing import Any

import torch

from xtrain.errors import ConfigurationError, explain
from xtrain.rehearsal.findings import Report
from xtrain.rehearsal.rehearse import Settings, rehearse
from xtrain.rehearsal.subject import Source, in_memory
from xtrain.run.checks import check_idle

_HOST = torch.device("cpu")


def check_in_memory(module: Any, data: Any, settings: Settings, trainer: Any) -> Report:
    """Rehearse `module` in forks of this process.

    Args:
        module: the user's, on the CPU.
        data: a loader, a DataModule, or None if the module has its own.
        settings: what is asked.
        trainer: whose settings decide what a step is.

    Raises:
        ConfigurationError: for tensors that are not on the CPU, or a system without forks.
    """
    check_idle(trainer, module)
    if not hasattr(os, "fork"):
        received = "a system without os.fork"
        raise ConfigurationError(explain("a system that forks processes", received, "xtrain check model.py:GAN"))
    elsewhere = next((name for name, p in module.named_parameters() if p.device != _HOST), None)
    if elsewhere is not None:
        fix = "trainer.check(module.cpu(), loader), before fit"
        raise ConfigurationError(explain("a module on the CPU", f"{elsewhere} on another device", fix))
    return rehearse(Source(type(module).__name__), settings, in_memory(module, data, trainer))
