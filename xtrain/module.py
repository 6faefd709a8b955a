"""`LightningModule`: what a researcher writes, and the verbs a training step uses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from xtrain.collectives import gather
from xtrain.compat.methods import LightningMethods
from xtrain.errors import ConfigurationError, ProtocolError, explain
from xtrain.hooks import ModuleHooks
from xtrain.hparams import KeepsHyperParameters
from xtrain.life import GradientLife
from xtrain.metrics.checks import Settings
from xtrain.metrics.logs import Logs
from xtrain.optimizer import LightningOptimizer
from xtrain.tensors import map_tensors

if TYPE_CHECKING:
    from xtrain.trainer import Trainer

_VERBS = frozenset(
    {"optimizers", "lr_schedulers", "manual_backward", "clip_gradients", "log", "log_dict", "all_gather", "print"}
)


class LightningModule(Logs, KeepsHyperParameters, ModuleHooks, LightningMethods, nn.Module):
    """A `torch.nn.Module` with a training step.

    Define `training_step` and `configure_optimizers`. In manual optimization
    (``self.automatic_optimization = False``) the step calls the verbs itself. The examples of the verbs are
    lines of such a step.

    Example:
        >>> class Regression(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.automatic_optimization = False
        ...         self.net = nn.Linear(3, 1)
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         opt = self.optimizers()
        ...         opt.zero_grad()
        ...         self.manual_backward(self.net(batch).square().mean())
        ...         self.clip_gradients(opt, gradient_clip_val=1.0)
        ...         opt.step()
        >>> trainer = Trainer(backend="cpu", max_epochs=1, enable_progress_bar=False)
        >>> trainer.fit(Regression(), [torch.ones(2, 3)] * 4)
        >>> trainer.global_step
        4
    """

    def __init__(self) -> None:
        super().__init__()
        self._trainer: Trainer | None = None
        self._life: GradientLife | None = None
        self._optimizers: Any = None
        self.automatic_optimization = True
        self.prepare_data_per_node = True

    def __setattr__(self, name: str, value: Any) -> None:
        if "_modules" not in self.__dict__ and isinstance(value, nn.Module | nn.Parameter):
            expected = f"super().__init__() before the first layer of {type(self).__name__}"
            received = f"self.{name} = ... on a module that was not initialised"
            raise ConfigurationError(explain(expected, received, "def __init__(self): super().__init__(); ..."))
        if name in _VERBS and not callable(value):
            received, fix = f"self.{name} = {value!r:.40}, which hides the verb", f"self.my_{name} = ..."
            raise ConfigurationError(explain("another name for an attribute", received, fix))
        try:
            super().__setattr__(name, value)
        except AttributeError as error:
            if not isinstance(getattr(type(self), name, None), property):
                raise
            received = f"self.{name} = {value!r:.40}, which xtrain reads from the run"
            raise ConfigurationError(
                explain("another name for an attribute", received, f"self.my_{name} = ...")
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle of the module is free of the run it was made in.
        return {**self.__dict__, "_trainer": None, "_life": None, "_optimizers": None}

    # ---------------------------------------------------------------- what the user defines

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Train on one batch. In automatic optimization return the loss, or a dict with ``"loss"``."""
        raise _undefined(self, "training_step")

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate one validation batch, without gradients."""
        raise _undefined(self, "validation_step")

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate one test batch, without gradients."""
        raise _undefined(self, "test_step")

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Return the prediction for one batch; the default calls the module on it."""
        return self(kwargs["batch"] if "batch" in kwargs else args[0])

    def configure_optimizers(self) -> Any:
        """Return the optimizers, in any of the forms listed in `xtrain.configure.ACCEPTED_FORMS`."""
        raise _undefined(self, "configure_optimizers")

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip before each step of automatic optimization. Not called in manual optimization."""
        if gradient_clip_val is not None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step `optimizer` in automatic optimization; override to warm up, skip or log."""
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Zero the gradients in automatic optimization."""
        optimizer.zero_grad()

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Step a scheduler in automatic optimization."""
        scheduler.step() if metric is None else scheduler.step(metric)

    # ---------------------------------------------------------------- the run

    @property
    def trainer(self) -> Trainer:
        """The Trainer of the current or last run.

        Raises:
            ProtocolError: if the module was never given to a Trainer.
        """
        if self._trainer is None:
            fix = "Trainer(max_epochs=1).fit(module)"
            raise ProtocolError(explain("a module that a Trainer runs", f"{type(self).__name__} outside of one", fix))
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        if trainer is not None and not hasattr(trainer, "fit"):
            fix = "Trainer(max_epochs=1).fit(module), which sets it"
            raise ConfigurationError(explain("a Trainer as self.trainer", repr(trainer), fix))
        self._trainer = trainer

    def _active(self, verb: str) -> GradientLife:
        if self._life is None:
            received = "a call before or outside of Trainer.fit"
            fix = f"def training_step(self, batch, batch_idx): ... self.{verb}(...)"
            raise ProtocolError(explain(f"{verb}() inside a run, where optimizers exist", received, fix))
        return self._life

    @property
    def device(self) -> torch.device:
        """Where the module's tensors are."""
        if self._trainer is not None:
            return self._trainer.backend.device
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype())

    current_epoch = property(lambda self: self._trainer.current_epoch if self._trainer else 0)
    global_step = property(lambda self: self._trainer.global_step if self._trainer else 0)
    global_rank = property(lambda self: self._trainer.global_rank if self._trainer else 0)
    local_rank = property(lambda self: self._trainer.local_rank if self._trainer else 0)
    logger = property(lambda self: self._trainer.logger if self._trainer else None)
    loggers = property(lambda self: self._trainer.loggers if self._trainer else [])

    # ---------------------------------------------------------------- the verbs of a training step

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """Return the optimizer, or the list of several.

        Args:
            use_pl_optimizer: False returns the raw torch optimizers. Stepping those works only
                where nothing is scaled, averaged or sharded.

        Raises:
            ProtocolError: before the first run.

        Example:
            >>> opt = self.optimizers()  # generator, discriminator = self.optimizers(), if there are two
            >>> opt.optimizer is self.optimizers(use_pl_optimizer=False)
            True
        """
        found = self._optimizers
        if found is None:  # nothing was configured yet
            self._active("optimizers")
            return []
        if use_pl_optimizer:
            return found
        return [o.optimizer for o in found] if isinstance(found, list) else found.optimizer

    def lr_schedulers(self) -> Any:
        """Return the scheduler, the list of several, or None. Their ``step`` belongs to you in manual mode.

        Example:
            >>> self.manual_backward(self.net(batch).square().mean())
            >>> if opt.step():  # False if a gradient overflowed
            ...     self.lr_schedulers().step()
        """
        if self._trainer is None:
            self._active("lr_schedulers")
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        if not schedulers:
            return None
        return schedulers[0] if len(schedulers) == 1 else schedulers

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the gradients of `loss`; use it instead of ``loss.backward()``.

        Args:
            loss: a tensor with one element and a graph.
            *args: passed on to `torch.Tensor.backward`, as are the keyword arguments.
            **kwargs: ``retain_graph``, ``gradient``, ``create_graph``, ``inputs``.

        Raises:
            ProtocolError: in automatic optimization, if a parameter was stepped between a forward and this
                backward of it, or if the backward adds to clipped gradients where the backend cannot (DeepSpeed).
            ConfigurationError: if `loss` is no scalar tensor or has no graph.
            NonFiniteLossError: if it is NaN or infinite and ``Trainer(nonfinite_loss="stop")``.

        Example:
            >>> self.manual_backward(self.net(batch).square().mean())
            >>> self.manual_backward(self.net(-batch).square().mean())  # adds to them
        """
        life = self._life or self._active("manual_backward")
        if self.automatic_optimization:
            received = "a call while automatic_optimization is True"
            fix = "def __init__(self): super().__init__(); self.automatic_optimization = False"
            raise ProtocolError(explain("manual_backward() in manual optimization only", received, fix))
        with life.backward(loss, bool(args) or "gradient" in kwargs):
            (life.override or life.backend.backward)(loss, *args, **kwargs)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass of `manual_backward` or of automatic optimization; override it to change how.

        Example:
            >>> def backward(self, loss, *args, **kwargs):
            ...     super().backward(loss, *args, retain_graph=True, **kwargs)
        """
        self._active("backward").run_backward(loss, *args, **kwargs)

    def clip_gradients(
        self,
        optimizer: Optimizer | LightningOptimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> Tensor:
        """Clip the gradients of `optimizer` in place, after they were averaged and unscaled.

        Args:
            optimizer: wrapped or raw.
            gradient_clip_val: the largest total 2-norm (algorithm ``"norm"``) or absolute value
                (``"value"``), above 0; infinity measures only. Default: the Trainer's, else infinity.
            gradient_clip_algorithm: ``"norm"`` (default) or ``"value"``.

        Returns:
            The total 2-norm of the gradients before clipping, 0-dim, on the device; 0 if there are none.

        Raises:
            ProtocolError: after the step.
            ConfigurationError: for a value or an algorithm that means nothing.

        Example:
            >>> self.manual_backward(self.net(batch).square().mean())
            >>> norm = self.clip_gradients(opt, gradient_clip_val=0.1)
            >>> bool(self.net.weight.grad.norm() <= 0.1)
            True
        """
        life = self._life or self._active("clip_gradients")
        value = self.trainer.gradient_clip_val if gradient_clip_val is None else gradient_clip_val
        value = math.inf if value is None else value
        algorithm: Any = gradient_clip_algorithm or self.trainer.gradient_clip_algorithm or "norm"
        wrapped: LightningOptimizer = life.wrapper_of(optimizer)
        return wrapped.clip_gradients(value, algorithm)

    def toggle_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> None:
        """Let only the parameters of `optimizer` require gradients, until `untoggle_optimizer`.

        Example:
            >>> self.toggle_optimizer(opt)
            >>> self.manual_backward(self.net(batch).square().mean())
            >>> self.untoggle_optimizer(opt)
        """
        life = self._active("toggle_optimizer")
        life.toggles.push(life.wrapper_of(optimizer))

    def untoggle_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> None:
        """Restore ``requires_grad`` as it was before `toggle_optimizer`.

        Example:
            >>> self.toggle_optimizer(opt)
            >>> self.untoggle_optimizer(opt)
        """
        life = self._active("untoggle_optimizer")
        life.toggles.pop(life.wrapper_of(optimizer))

    @contextmanager
    def toggled_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> Iterator[None]:
        """Toggle `optimizer` inside the context; restored after exceptions and when nested.

        Example:
            >>> with self.toggled_optimizer(opt):
            ...     self.manual_backward(self.net(batch).square().mean())
        """
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    # ---------------------------------------------------------------- logging and collectives

    def _record(self, values: Mapping[str, Any], settings: Settings, batch_size: int | None) -> None:
        self.trainer.metrics._record(values, settings, batch_size)

    def all_gather(self, data: Any, *, sync_grads: bool = False) -> Any:
        """Return `data` with each tensor gathered from all ranks, shape ``(world_size, *shape)``.

        Args:
            data: a tensor, or nested dicts and sequences of tensors, shaped alike on every rank.
            sync_grads: let gradients flow back to the rank that a part came from, summed over the ranks
                whose losses used it; every rank must run that backward. Otherwise the result has no graph.

        Example:
            >>> self.all_gather({"norm": torch.tensor(2.0)})["norm"].shape  # (world_size,)
            torch.Size([1])
        """
        ranks = self.trainer.backend.collectives
        return map_tensors(lambda tensor: gather(tensor, ranks, sync_grads), data)

    def log_image(self, key: str, images: Any) -> None:
        """Show one image or figure, or a list of them, in every logger that can.

        Args:
            key: the name it gets there.
            images: see `xtrain.loggers.values.as_pixels`. They are read at once, so log them rarely.

        Example:
            >>> self.trainer.loggers[:] = [xtrain.loggers.TensorBoardLogger("logs")]
            >>> self.log_image("sample", torch.rand(3, 8, 8))
            >>> self.trainer.loggers[0].finalize("success")
        """
        self.trainer.log_image(key, images)

    def print(self, *values: Any) -> None:
        """Print on rank 0 only, above the progress bar.

        Example:
            >>> self.print("batch", batch_idx)
            batch 0
        """
        self.trainer.print(*values)


def _undefined(module: LightningModule, name: str) -> ConfigurationError:
    fix = f"def {name}(self, ...): ..."
    return ConfigurationError(explain(f"{type(module).__name__}.{name} to be defined", "a module without it", fix))
