"""What is said at the start of a run: one line about it, and what its author can hardly have meant."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from contextlib import suppress
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from xtrain.callbacks.summary import count_parameters
from xtrain.configure import LRSchedulerConfig
from xtrain.errors import ConfigurationError, explain
from xtrain.run.state import Run

_SHOWN = 3
_MANY_CORES = 4


def introduce(run: Run) -> None:
    """Say in one line on rank 0 what runs where, and why, unless the run is a bare one."""
    trainer = run.trainer
    if not trainer.is_global_zero or trainer.options.barebones or sys.stderr is None:  # pythonw has none
        return
    count, trained = count_parameters(run.module, run.backend)
    text = f"{trainer.origin}; parameters={count:,}" + (f" ({trained:,} trainable)" if trained < count else "")
    with suppress(OSError, ValueError):  # the terminal has gone
        print(text, file=sys.stderr, flush=True)


def advise(run: Run) -> None:
    """Warn about `run`, a fit whose loaders and optimizers are known.

    Raises:
        ConfigurationError: for a ``training_step`` of an older version of Lightning.
    """
    module = run.module
    if "optimizer_idx" in inspect.signature(module.training_step).parameters:
        fix = "self.automatic_optimization = False; opt_a, opt_b = self.optimizers() in training_step(batch, batch_idx)"
        raise ConfigurationError(explain("training_step(self, batch, batch_idx)", "one with optimizer_idx", fix))
    texts = [_no_end(run), _in_eval_mode(module), _few_workers(run), _rare_logs(run)]
    if not module.automatic_optimization:
        texts += [_ignored_monitor(config) for config in run.schedulers]
    for text in texts:
        if text is not None:
            warnings.warn(text, UserWarning, stacklevel=2)


def _no_end(run: Run) -> str | None:
    if run.trainer.max_epochs is not None or run.plan.max_epochs is None:
        return None
    fix = "Trainer(max_epochs=1000), or max_epochs=-1 for no end"
    return explain("max_epochs or max_steps", f"neither, so that it trains {run.plan.max_epochs} epochs", fix)


def _in_eval_mode(module: nn.Module) -> str | None:
    found = [name for name, child in module.named_modules() if name and not child.training]
    if not found:
        return None
    shown = ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
    fix = f"self.{found[0]}.train() before trainer.fit, unless it is frozen on purpose"
    return explain("every layer in train mode when a training starts", f"{shown} in eval mode", fix)


def _few_workers(run: Run) -> str | None:
    """Return a warning if a device waits for a single process that loads and computes in turn."""
    loader: Any = run.plan.loader
    cores = os.cpu_count() or 1
    waits = run.backend.capabilities.asynchronous and cores >= _MANY_CORES
    if not waits or not isinstance(loader, DataLoader) or loader.num_workers or _in_memory(loader.dataset):
        return None
    received = f"num_workers=0, with {cores} cores"
    return explain("processes that load batches while the device computes", received, "DataLoader(..., num_workers=4)")


def _rare_logs(run: Run) -> str | None:
    """Return a warning if an epoch ends before its first log point, so that each has one row of step values."""
    every, batches = run.trainer.log_every_n_steps, run.plan.batches
    if not run.trainer.loggers or run.trainer.fast_dev_run or batches is None or not 0 < batches < every:
        return None
    fix = f"Trainer(log_every_n_steps={max(1, batches // 10)})"
    return explain(f"log_every_n_steps of at most the {batches} batches of an epoch", every, fix)


def _in_memory(dataset: Any) -> bool:
    return hasattr(dataset, "tensors") or (hasattr(dataset, "dtype") and not isinstance(dataset, IterableDataset))


def _ignored_monitor(config: LRSchedulerConfig) -> str | None:
    if config.monitor is None:
        return None
    fix = "self.lr_schedulers().step(self.trainer.callback_metrics[...]) in on_train_epoch_end"
    received = f"monitor={config.monitor!r}, which nobody reads"
    return explain("no monitor of a scheduler in manual optimization, which steps it itself", received, fix)
