"""Options of the Trainer that are switches of torch, or change the module, during a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn

from xtrain.errors import ConfigurationError, explain
from xtrain.run.state import Run


@contextmanager
def in_effect(run: Run) -> Iterator[None]:
    """Let the options that are switches of torch, or change the module, hold during `run`."""
    options = run.trainer.options
    _check_nodes(run)
    convert = options.sync_batchnorm and run.backend.collectives.world_size > 1
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.is_anomaly_enabled(),
    )
    replaced = list(_synchronised(run.module)) if convert else []
    networks = _compiled_networks(run) if options.compile == "networks" and run.stage == "fit" else nullcontext()
    try:
        if options.deterministic:
            torch.use_deterministic_algorithms(True, warn_only=options.deterministic == "warn")
        if options.benchmark is not None or options.deterministic:
            torch.backends.cudnn.benchmark = bool(options.benchmark) and not options.deterministic
        if options.detect_anomaly and run.stage == "fit":
            torch.autograd.set_detect_anomaly(True)
        with networks:
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = before[2]
        torch.autograd.set_detect_anomaly(before[3])
        for parent, name, child in replaced:
            setattr(parent, name, child)


def _compiled_networks(run: Run) -> AbstractContextManager[None]:
    """Return the context in which networks run compiled; copies made in the run are, from the next epoch on."""
    from xtrain.compiled.networks import compile_networks, networks_compiled

    run.hooks["on_train_epoch_start"].insert(0, partial(compile_networks, run.module))
    return networks_compiled(run.module)


def _synchronised(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Put a SyncBatchNorm in the place of every batch norm, with its parameters; yield what was there."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, nn.SyncBatchNorm):
                setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
                yield parent, name, child


def _check_nodes(run: Run) -> None:
    wanted, found = run.trainer.options.num_nodes, run.trainer.num_nodes
    if wanted is not None and wanted != found:
        fix = f"torchrun --nnodes={wanted} ... on every host, see docs/launch.md"
        raise ConfigurationError(explain(f"processes on num_nodes={wanted} hosts", f"processes on {found}", fix))
