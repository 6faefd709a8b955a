"""Averages of the weights over the training, by `torch.optim.swa_utils.AveragedModel`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from xtrain.callbacks.base import Callback
from xtrain.errors import ConfigurationError, explain

if TYPE_CHECKING:
    from xtrain.contract import Backend
    from xtrain.module import LightningModule
    from xtrain.trainer import Trainer


class WeightAveraging(Callback):
    """Keeps an average of the weights; validation uses it, and the module ends with it.

    Each process averages what it keeps of a parameter, in at least 32 bits: an average is taken element
    by element, so it is the same for whole and for sharded parameters.

    Args:
        device: where the average is kept; default: where the parameters are.
        use_buffers: average buffers (running statistics), too; otherwise they are the module's present ones.
        **kwargs: of `AveragedModel`: ``avg_fn`` or ``multi_avg_fn``. Default: the plain mean.

    Example:
        >>> class Late(WeightAveraging):
        ...     def should_update(self, step_idx=None, epoch_idx=None):
        ...         return epoch_idx is not None and epoch_idx >= 10
    """

    def __init__(self, device: torch.device | str | int | None = None, use_buffers: bool = True, **kwargs: Any) -> None:
        self._options: dict[str, Any] = {"device": device, "use_buffers": use_buffers, **kwargs}
        self._live: _LiveModule | None = None
        self._average: AveragedModel | None = None
        self._loaded: dict[str, Any] | None = None
        self._swapped = False
        self._seen_step = 0

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Return whether to add the present weights to the average.

        Args:
            step_idx: the training step that has just ended, from 0; None at the end of an epoch.
            epoch_idx: the epoch that has just ended, from 0; None after a step.
        """
        return step_idx is not None

    # ---------------------------------------------------------------- when

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin with the weights as they are, or with those of a checkpoint."""
        self._live = _LiveModule(module, trainer.backend)
        self._average = AveragedModel(self._live, **self._options)  # type: ignore[arg-type]  # it copies itself
        self._seen_step, self._swapped = trainer.global_step, False
        if self._loaded is not None:
            self._average.load_state_dict(self._loaded)
            self._loaded = None

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average after a step that changed the weights."""
        if trainer.global_step > self._seen_step and self.should_update(step_idx=trainer.global_step - 1):
            self._update()
        self._seen_step = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Average after an epoch, if that is asked for."""
        if self.should_update(epoch_idx=trainer.current_epoch):
            self._update()

    def on_validation_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Validate the average."""
        if self._average is not None and self._average.n_averaged > 0 and not self._swapped:
            self._swap()

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Train on with the weights of the training."""
        if self._swapped:
            self._swap()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Leave the average in the module."""
        if self._average is not None and self._live is not None and self._average.n_averaged > 0:
            with torch.no_grad():
                for own, averaged in self._pairs():
                    own.copy_(averaged)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """Give the module its own weights back if validation failed."""
        if self._swapped:
            self._swap()

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Let go of the module."""
        self._live = self._average = None

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the average and how many weights it is of.

        Raises:
            ConfigurationError: where each process keeps its own shard of it, which one file would lose.
        """
        if self._average is None or self._live is None:
            return {}
        if self._live.sharded:
            fix = "a backend that keeps parameters whole, or no WeightAveraging beside checkpoints"
            raise ConfigurationError(explain("averages of whole parameters in a checkpoint", "shards of them", fix))
        return {name: value.detach().to("cpu", copy=True) for name, value in self._average.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the average that `state_dict` returned, when training starts."""
        self._loaded = state or None

    # ---------------------------------------------------------------- how

    def _update(self) -> None:
        assert self._average is not None
        self._average.update_parameters(self._live)  # type: ignore[arg-type]  # it has parameters and buffers

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        assert self._average is not None
        assert self._live is not None
        yield from zip(self._live.parts(), self._average.module.parameters(), strict=True)
        if self._average.use_buffers:
            yield from zip(self._live.buffers(), self._average.module.buffers(), strict=True)

    def _swap(self) -> None:
        with torch.no_grad():
            for own, averaged in self._pairs():
                kept = own.clone()
                own.copy_(averaged)
                averaged.copy_(kept)
        self._swapped = not self._swapped


class EMAWeightAveraging(WeightAveraging):
    """Keeps an exponential moving average: ``average = decay * average + (1 - decay) * weights``.

    Args:
        device: where the average is kept; default: where the parameters are.
        use_buffers: average buffers, too.
        decay: share of the old average, 0 to 1.
        update_every_n_steps: training steps between two updates.
        update_starting_at_step: the first training step that counts.
        update_starting_at_epoch: average at the ends of epochs, too, from this one on.

    Example:
        >>> trainer = Trainer(callbacks=[EMAWeightAveraging(decay=0.999)])
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
    ) -> None:
        super().__init__(device, use_buffers, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self._every, self._first_step = update_every_n_steps, update_starting_at_step or 0
        self._first_epoch = update_starting_at_epoch

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Return whether the step or the epoch that ended is one of those asked for."""
        if step_idx is not None:
            return step_idx >= self._first_step and step_idx % self._every == 0
        return epoch_idx is not None and self._first_epoch is not None and epoch_idx >= self._first_epoch


class _LiveModule:
    """What `AveragedModel` needs of a module: its present weights, whatever keeps them, and a copy of them."""

    def __init__(self, module: nn.Module, backend: Backend) -> None:
        self._module, self._backend = module, backend

    @property
    def sharded(self) -> bool:
        """Whether other processes keep parts of the parameters."""
        whole = self._backend.elements_of
        return any(part.numel() != whole(p) for p, part in zip(self._module.parameters(), self.parts(), strict=True))

    def parts(self) -> Iterator[Tensor]:
        """Yield the memory of this process's part of each parameter."""
        return (self._backend.local_part(p).detach() for p in self._module.parameters())

    def parameters(self) -> Iterator[Tensor]:
        """Yield the same in at least 32 bits."""
        low = {torch.bfloat16, torch.float16}
        return (part.float() if part.dtype in low else part for part in self.parts())

    def buffers(self) -> Iterator[Tensor]:
        """Yield the module's buffers."""
        return self._module.buffers()

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        copied = nn.Module()
        for index, part in enumerate(self.parameters()):
            copied.register_parameter(str(index), nn.Parameter(part.clone(), requires_grad=False))
        for index, buffer in enumerate(self.buffers()):
            copied.register_buffer(f"buffer_{index}", buffer.detach().clone())
        return copied
