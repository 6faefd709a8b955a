"""The hooks of a callback: every method here does nothing until it is overridden."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from inspect import isfunction
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from xtrain.compat.imports import in_place_of
from xtrain.errors import ConfigurationError, ProtocolError, explain
from xtrain.metrics.checks import Settings
from xtrain.metrics.logs import Logs

if TYPE_CHECKING:
    from xtrain.metrics.log import MetricLog
    from xtrain.module import LightningModule
    from xtrain.trainer import Trainer


class Callback(Logs):
    """Code that a Trainer runs at certain moments; override what you need.

    Only overridden hooks are called, so the others cost nothing. A callback runs before the hook of
    the same name of the module; several callbacks run in the order they were given. Every hook gets
    the Trainer and the module that is run. `batch` is on the device already, and `dataloader_idx`
    counts evaluation loaders from 0.

    Attributes:
        after_module: True in a class that reads what the module logs: it runs after the module's hooks, and
            finds what they logged in ``trainer.callback_metrics``.

    Example:
        >>> class Announce(Callback):
        ...     def on_train_epoch_end(self, trainer, module):
        ...         print(f"epoch {trainer.current_epoch} is done")
    """

    after_module: ClassVar[bool] = False
    _metrics: MetricLog | None = None  # those of the run, set by the Trainer

    def _record(self, values: Mapping[str, Any], settings: Settings, batch_size: int | None) -> None:
        if self._metrics is None:
            fix = "Trainer(callbacks=[callback]).fit(model)"
            raise ProtocolError(explain(f"{type(self).__name__}.log inside of a run", "a call outside of one", fix))
        self._metrics._record(values, settings, batch_size)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_metrics": None}  # a copy is free of the run it was made in

    # ---------------------------------------------------------------- checkpoints

    @property
    def state_key(self) -> str:
        """The name of this callback in a checkpoint; override it where several of one class are used."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint should keep: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; called before `on_fit_start`."""

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Before a checkpoint is written; add keys to `checkpoint`, or look at it. All ranks come here."""

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """After a checkpoint was read, before anything is taken from it: what is changed in it counts."""

    # ---------------------------------------------------------------- a run

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Before the module moves to its device. `stage`: fit, validate, test or predict."""

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """After a run, also one that ended by an exception."""

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """After the optimizers were set up."""

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """After `on_train_end`."""

    def on_sanity_check_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Before the few validation batches that precede training."""

    def on_sanity_check_end(self, trainer: Trainer, module: LightningModule) -> None:
        """After the few validation batches that precede training."""

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """When a run is about to end by `exception`, a KeyboardInterrupt included."""

    # ---------------------------------------------------------------- training

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Before the first epoch."""

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """After the last epoch."""

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Before the first batch of an epoch."""

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """After the last batch; ``trainer.callback_metrics`` holds the epoch's metrics."""

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> int | None:
        """Before a training step; return -1 to skip the rest of the epoch."""

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a training step; `outputs` is what it returned."""

    # ---------------------------------------------------------------- validation

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Before validation."""

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """After validation."""

    def on_validation_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Before the first validation batch."""

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """After the last validation batch; ``trainer.callback_metrics`` holds the results."""

    def on_validation_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before a validation step."""

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """After a validation step; `outputs` is what it returned."""

    # ---------------------------------------------------------------- testing

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Before testing."""

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        """After testing."""

    def on_test_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Before the first test batch."""

    def on_test_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """After the last test batch; ``trainer.callback_metrics`` holds the results."""

    def on_test_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before a test step."""

    def on_test_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """After a test step; `outputs` is what it returned."""

    # ---------------------------------------------------------------- prediction

    def on_predict_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Before prediction."""

    def on_predict_end(self, trainer: Trainer, module: LightningModule) -> None:
        """After prediction."""

    def on_predict_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Before the first prediction batch."""

    def on_predict_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """After the last prediction batch."""

    def on_predict_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before a prediction step."""

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """After a prediction step; `outputs` is what it returned."""

    # ---------------------------------------------------------------- the life of a gradient

    def on_before_zero_grad(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        """Before the gradients of the raw `optimizer` are dropped."""

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        """Before each backward; `loss` is 0-dim and unscaled."""

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        """After each backward; gradients are local and may be scaled."""

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        """Before the raw `optimizer` steps; its gradients are averaged and unscaled."""


def check_callbacks(callbacks: Iterable[Any]) -> None:
    """Check that each is a `Callback`.

    Raises:
        ConfigurationError: names the class of one that is not.
    """
    for callback in callbacks:
        if not isinstance(callback, Callback):
            fix = in_place_of(callback) or "class MyCallback(xtrain.Callback): ..."
            raise ConfigurationError(explain("callbacks derived from xtrain.Callback", type(callback).__name__, fix))


def hook_names() -> list[str]:
    """Return the names of the hooks that a callback may have."""
    others = ("_", "log", "state_dict", "load_state_dict")
    return [n for n, v in vars(Callback).items() if isfunction(v) and not n.startswith(others)]
