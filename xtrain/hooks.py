"""The hooks of a `LightningModule`: every method here does nothing until it is overridden.

Only overridden hooks are called, so an unused hook costs nothing. Callbacks have the same hooks with
``(trainer, module, ...)`` in front, and run before the module's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from inspect import isfunction
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from torch.optim import Optimizer

from xtrain.checkpoint.loading import LoadsFromCheckpoint
from xtrain.tensors import map_tensors, moved

if TYPE_CHECKING:
    import torch
    from torch import nn


class BatchHooks:
    """What happens to a batch on its way to the device; a module or a DataModule may override it."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the batch to be moved."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch on `device`; overriding it replaces the backend's own transfer."""
        return map_tensors(lambda tensor: tensor.to(device), batch, lambda item: moved(item, device))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the batch the step will see."""
        return batch


class ModuleHooks(LoadsFromCheckpoint, BatchHooks):
    """Names, arguments and moments of the hooks; signatures are Lightning's."""

    def setup(self, stage: str) -> None:
        """Run on every process before the module moves to its device. `stage`: fit, validate, test, predict."""

    def prepare_data(self) -> None:
        """Download or write files; runs first, on rank 0 only."""

    def configure_model(self) -> None:
        """Make layers that were left out of ``__init__``; runs after `setup`. May run several times."""

    def teardown(self, stage: str) -> None:
        """Run on every process after a run, also after an exception."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Before a checkpoint is written; add keys to it, or look at it. All ranks come here."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """After a checkpoint was read, before anything is taken from it: what is changed in it counts."""

    def on_fit_start(self) -> None:
        """After optimizers were set up, before the sanity check."""

    def on_fit_end(self) -> None:
        """After the last `on_train_end`."""

    def on_train_start(self) -> None:
        """After the sanity check, before the first epoch."""

    def on_train_end(self) -> None:
        """After the last epoch."""

    def on_train_epoch_start(self) -> None:
        """Before the first batch of an epoch."""

    def on_train_epoch_end(self) -> None:
        """After validation of the epoch; ``trainer.callback_metrics`` holds the epoch's metrics."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Before a training step; return -1 to skip the rest of the epoch."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a training step and its boundary; `outputs` is what the step returned."""

    def on_validation_start(self) -> None:
        """Before validation."""

    def on_validation_end(self) -> None:
        """After validation."""

    def on_validation_epoch_start(self) -> None:
        """Before the first validation batch."""

    def on_validation_epoch_end(self) -> None:
        """After the last validation batch."""

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before a validation step."""

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After a validation step."""

    def on_validation_model_zero_grad(self) -> None:
        """Before validation inside of a fit; gradients stay unless it is overridden. What it does here: drop them."""
        _as_module(self).zero_grad()

    def on_validation_model_eval(self) -> None:
        """Put the layers in eval mode before validation."""
        _as_module(self).eval()

    def on_validation_model_train(self) -> None:
        """After validation, in place of giving every layer back the mode it had; what it does here: train mode."""
        _as_module(self).train()

    def on_test_model_eval(self) -> None:
        """Put the layers in eval mode before testing."""
        _as_module(self).eval()

    def on_test_model_train(self) -> None:
        """After testing, in place of giving every layer back the mode it had; what it does here: train mode."""
        _as_module(self).train()

    def on_predict_model_eval(self) -> None:
        """Put the layers in eval mode before prediction."""
        _as_module(self).eval()

    def on_test_start(self) -> None:
        """Before testing."""

    def on_test_end(self) -> None:
        """After testing."""

    def on_test_epoch_start(self) -> None:
        """Before the first test batch."""

    def on_test_epoch_end(self) -> None:
        """After the last test batch."""

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before a test step."""

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After a test step."""

    def on_predict_start(self) -> None:
        """Before prediction."""

    def on_predict_end(self) -> None:
        """After prediction."""

    def on_predict_epoch_start(self) -> None:
        """Before the first prediction batch."""

    def on_predict_epoch_end(self) -> None:
        """After the last prediction batch."""

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before a prediction step."""

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After a prediction step."""

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        """Before gradients of the raw `optimizer` are dropped."""

    def on_before_backward(self, loss: Tensor) -> None:
        """Before each backward."""

    def on_after_backward(self) -> None:
        """After each backward; gradients are local and may be scaled."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Before the raw `optimizer` steps; its gradients are averaged and unscaled."""


def _as_module(hooks: ModuleHooks) -> nn.Module:
    return cast("nn.Module", hooks)


def is_overridden(name: str, owner: object, base: type) -> bool:
    """Return whether `owner` defines `name` otherwise than `base` does."""
    method = getattr(owner, name, None)
    return method is not None and getattr(method, "__func__", method) is not getattr(base, name, None)


def collect_hooks(
    trainer: Any, module: Any, callbacks: Iterable[Any], callback_base: type, reduce_epoch: Callable[[], None]
) -> dict[str, list[Any]]:
    """Return the overridden hooks by name: callbacks in their order, the module, then the callbacks that watch it.

    Args:
        trainer: what callbacks are given.
        module: the user's module.
        callbacks: those of the run.
        callback_base: the class whose methods do nothing.
        reduce_epoch: called between the module and the callbacks that watch it, when an epoch ends.
    """
    hooks: dict[str, list[Callable[..., Any]]] = {}
    names = {n for base in (ModuleHooks, callback_base) for n, v in vars(base).items() if isfunction(v) and n[0] != "_"}
    for name in names:
        having = [callback for callback in callbacks if is_overridden(name, callback, callback_base)]
        chains: list[list[Callable[..., Any]]] = [
            [partial(getattr(callback, name), trainer, module) for callback in having if callback.after_module is late]
            for late in (False, True)
        ]
        first, last = chains
        if hasattr(ModuleHooks, name) and is_overridden(name, module, ModuleHooks):
            first.append(getattr(module, name))
        if last and name.endswith("_epoch_end"):  # what the module has just logged is reduced over steps and ranks
            first.append(reduce_epoch)
        hooks[name] = [*first, *last]
    return hooks
