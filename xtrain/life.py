"""What the optimizers of one run share: the backend, the toggles, the hooks, and what is said once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from xtrain.contract import Backend, Phase
from xtrain.errors import (
    BACKWARD_AFTER_CLIP,
    LOSS,
    STEPPED_BETWEEN,
    ConfigurationError,
    NonFiniteLossError,
    ProtocolError,
    explain,
)
from xtrain.guard import Seen, guard
from xtrain.toggle import ToggleStack

Hooks = dict[str, list[Callable[..., Any]]]


class GradientLife:
    """What the optimizers of one run share: backend, toggles, hooks. Each has a phase and counters of its own.

    Args:
        backend: executes the verbs.
        hooks: the overridden hooks by name, as callables.
        nonfinite_loss: ``"warn"``, ``"stop"`` or ``"ignore"`` for a loss that is NaN or infinite.
    """

    def __init__(self, backend: Backend, hooks: Hooks, nonfinite_loss: str = "warn") -> None:
        self.backend = backend
        self.hooks = hooks
        self.optimizers: list[Any] = []  # of type LightningOptimizer, which knows this class
        self.toggles = ToggleStack(self.optimizers)
        self.automatic = False  # whether the loop calls backward, and nobody else may
        self.stepped = False
        self.lost: str | None = None  # what a gradient misses that only a backend could complete
        self.counter: Any = None  # the progress of a Trainer whose global_step counts every step
        self.in_backward = False
        self.override: Callable[..., None] | None = None  # the module's own backward
        self.last_loss: Tensor | None = None
        self._asynchronous = backend.capabilities.asynchronous
        self._nonfinite_loss = nonfinite_loss
        self._warned: set[str] = set()

    def backward(self, loss: Tensor, has_gradient_argument: bool = False) -> Backward:
        """Begin one backward, and return the context that it runs in: checks and hooks before, bookkeeping after it.

        Args:
            loss: what the backward starts from.
            has_gradient_argument: the caller gives ``gradient``, so `loss` may have several elements.

        Raises:
            ConfigurationError: if `loss` is no scalar tensor or has no graph.
            NonFiniteLossError: if it is NaN or infinite and the run is to stop there.
            ProtocolError: at the end of the context, if the backward reached finalized gradients that the backend
                cannot add to, or parameters that were stepped after its forward.
        """
        self._check_loss(loss, has_gradient_argument)
        for hook in self.hooks["on_before_backward"]:
            hook(loss)
        self.in_backward = self.override is None
        return Backward(self)

    def run_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the backend's backward, for a module that overrides its own."""
        outer, self.in_backward = self.in_backward, True
        try:
            self.backend.backward(loss, *args, **kwargs)
        finally:
            self.in_backward = outer

    def count(self, optimizer: Any) -> None:
        """Count a step where every one counts, but for an `optimizer` told by ``_on_after_step``, as in Lightning."""
        if self.counter is not None and "_on_after_step" not in vars(optimizer):
            self.counter.global_step += 1

    def _check_loss(self, loss: Tensor, has_gradient_argument: bool) -> None:
        if not isinstance(loss, Tensor):
            raise ConfigurationError(LOSS.format(f"{type(loss).__name__} {loss!r:.60}"))
        if not (is_single := loss.numel() == 1) and not has_gradient_argument:
            raise ConfigurationError(LOSS.format(f"shape {tuple(loss.shape)}"))
        if not loss.requires_grad:
            raise ConfigurationError(LOSS.format("a loss without a graph (made under no_grad, detached, or frozen)"))
        if is_single and self._nonfinite_loss != "ignore":
            if self._asynchronous:
                self.last_loss = loss.detach()
            else:
                self.check_finite(loss.item())

    def guard(self) -> list[Any]:
        """Refuse raw steps and direct backwards where the backend would lose something by them.

        Returns:
            Handles; call ``remove()`` on each when the run ends.
        """
        self.lost = lost = self.backend.unseen_gradient()
        if lost is None:
            return []
        return [handle for o in self.optimizers for handle in guard(o, self.backend.leaves_of(o), lost, o.allows)]

    def check_finite(self, loss: float) -> None:
        """Warn once, or raise `NonFiniteLossError`, if `loss` is NaN or infinite."""
        if math.isfinite(loss):
            return
        ranks = self.backend.collectives
        received = f"{loss} on rank {ranks.rank}" if ranks.world_size > 1 else f"{loss}"
        if self._nonfinite_loss == "stop":
            fix = "a smaller learning rate, self.clip_gradients(...), or Trainer(nonfinite_loss='warn') to go on"
            raise NonFiniteLossError(explain("a finite loss", received, fix))
        fix = "Trainer(nonfinite_loss='stop') ends the run here, 'ignore' hides this message"
        self.warn_once(explain("a finite loss", received, fix), about="a loss that is not finite")

    def warn_once(self, text: str, about: str | None = None) -> None:
        """Warn, but only the first time in this run; messages that differ in details have one subject, `about`."""
        if (about or text) not in self._warned:
            self._warned.add(about or text)
            warnings.warn(text, UserWarning, stacklevel=4)

    def wrapper_of(self, optimizer: Any) -> Any:
        """Return the `LightningOptimizer` for a wrapped or raw optimizer of this run.

        Raises:
            ConfigurationError: if it is neither.
        """
        for candidate in self.optimizers:
            if candidate is optimizer or candidate.optimizer is optimizer:
                return candidate
        expected, received = "an optimizer returned by configure_optimizers", type(optimizer).__name__
        raise ConfigurationError(explain(expected, received, "opt = self.optimizers()"))


class Backward:
    """The context of one backward; at its end the optimizers that it made gradients for know of them."""

    def __init__(self, life: GradientLife) -> None:
        self._life = life
        finalized = [] if life.lost is None else [o for o in life.optimizers if o.phase is Phase.FINALIZED]
        self._finalized = [(optimizer, life.backend.gradient_versions(optimizer)) for optimizer in finalized]

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        life, self._life.in_backward = self._life, False
        if kind is not None:
            if isinstance(error, RuntimeError) and "modified by an inplace operation" in str(error) and life.stepped:
                raise ProtocolError(explain(STEPPED_BETWEEN[0], f"{error}", STEPPED_BETWEEN[1])) from error
            return
        for optimizer, before in self._finalized:
            if life.backend.gradient_versions(optimizer) != before:
                if not life.backend.capabilities.editable_gradients:
                    raise ProtocolError(BACKWARD_AFTER_CLIP.format(optimizer=optimizer))
                optimizer.phase = Phase.ACCUMULATED  # an average of averaged plus local gradients is right
        for optimizer in life.toggles.active[-1:] or life.optimizers:
            if optimizer.phase is not Phase.FINALIZED:
                optimizer.phase = Phase.ACCUMULATED
                optimizer.seen = None if life.lost is None else Seen(life.backend, optimizer)
        for hook in life.hooks["on_after_backward"]:
            hook()
