"""`LightningOptimizer`: the life of a gradient, in the same order on every backend.

    zero_grad -> backward -> finalize -> clip -> step

Finalizing (averaging over ranks, unscaling) happens exactly once per step, when the gradient is
first needed: by `LightningOptimizer.clip_gradients` or by `LightningOptimizer.step`, whichever comes
first. Every optimizer keeps its own phase, so nothing one optimizer does decides for another.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from xtrain.checks import check_clip_value
from xtrain.contract import Backend, Phase
from xtrain.errors import (
    BACKWARD_AFTER_CLIP,
    CLIP_AFTER_STEP,
    LOSS,
    NOTHING_ACCUMULATED,
    RAW_STEP,
    STEPPED_BETWEEN,
    UNSEEN,
    ConfigurationError,
    NonFiniteLossError,
    ProtocolError,
    explain,
)
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
        self.optimizers: list[LightningOptimizer] = []
        self.toggles = ToggleStack(self.optimizers)
        self.stepped = False
        self.in_backward = False
        self.last_loss: Tensor | None = None
        self._asynchronous = backend.capabilities.asynchronous
        self._nonfinite_loss = nonfinite_loss
        self._warned: set[str] = set()

    def wrap(self, optimizers: Sequence[Optimizer]) -> None:
        """Take in the user's `optimizers`."""
        self.optimizers.extend(LightningOptimizer(optimizer, self) for optimizer in optimizers)

    @contextmanager
    def backward(self, loss: Tensor, has_gradient_argument: bool = False) -> Iterator[None]:
        """Return the context of one backward: checks before, bookkeeping and hooks around it.

        Args:
            loss: what the backward starts from.
            has_gradient_argument: the caller gives ``gradient``, so `loss` may have several elements.

        Raises:
            ConfigurationError: if `loss` is no scalar tensor or has no graph.
            NonFiniteLossError: if it is NaN or infinite and the run is to stop there.
            ProtocolError: if the backward reached gradients that were already finalized, or parameters that
                were stepped after its forward.
        """
        self._check_loss(loss, has_gradient_argument)
        for hook in self.hooks["on_before_backward"]:
            hook(loss)
        finalized = [(o, self.backend.gradient_versions(o)) for o in self.optimizers if o.phase is Phase.FINALIZED]
        self.in_backward = True
        try:
            yield
        except RuntimeError as error:
            if "modified by an inplace operation" in str(error) and self.stepped:
                raise ProtocolError(explain(STEPPED_BETWEEN[0], f"{error}", STEPPED_BETWEEN[1])) from error
            raise
        finally:
            self.in_backward = False
        for optimizer, versions in finalized:
            if self.backend.gradient_versions(optimizer) != versions:
                raise ProtocolError(BACKWARD_AFTER_CLIP.format(optimizer=optimizer))
        for optimizer in self.toggles.active[-1:] or self.optimizers:
            if optimizer.phase is not Phase.FINALIZED:
                optimizer.phase = Phase.ACCUMULATED
        for hook in self.hooks["on_after_backward"]:
            hook()

    def _check_loss(self, loss: Tensor, has_gradient_argument: bool) -> None:
        if not isinstance(loss, Tensor):
            raise ConfigurationError(LOSS.format(f"{type(loss).__name__} {loss!r:.60}"))
        if loss.numel() != 1 and not has_gradient_argument:
            raise ConfigurationError(LOSS.format(f"shape {tuple(loss.shape)}"))
        if not loss.requires_grad:
            raise ConfigurationError(LOSS.format("a loss without a graph (made under no_grad, detached, or frozen)"))
        if self._nonfinite_loss != "ignore" and loss.numel() == 1:
            if self._asynchronous:
                self.last_loss = loss.detach()
            elif not math.isfinite(value := loss.item()):
                self.check_finite(value)

    def guard(self) -> list[Any]:
        """Refuse raw steps and direct backwards where the backend would lose something by them.

        Returns:
            Handles; call ``remove()`` on each when the run ends.
        """
        lost = self.backend.unseen_gradient()
        return [] if lost is None else [handle for o in self.optimizers for handle in o.guard(lost)]

    def check_finite(self, loss: float) -> None:
        """Warn once, or raise `NonFiniteLossError`, if `loss` is NaN or infinite."""
        if math.isfinite(loss):
            return
        if self._nonfinite_loss == "stop":
            fix = "a smaller learning rate, self.clip_gradients(...), or Trainer(nonfinite_loss='warn') to go on"
            raise NonFiniteLossError(explain("a finite loss", loss, fix))
        fix = "Trainer(nonfinite_loss='stop') ends the run here, 'ignore' hides this message"
        self.warn_once(explain("a finite loss", loss, fix), about="a loss that is not finite")

    def warn_once(self, text: str, about: str | None = None) -> None:
        """Warn, but only the first time in this run; messages that differ in details have one subject, `about`."""
        if (about or text) not in self._warned:
            self._warned.add(about or text)
            warnings.warn(text, UserWarning, stacklevel=4)

    def wrapper_of(self, optimizer: Optimizer | LightningOptimizer) -> LightningOptimizer:
        """Return the `LightningOptimizer` for a wrapped or raw optimizer of this run.

        Raises:
            ConfigurationError: if it is neither.
        """
        for candidate in self.optimizers:
            if candidate is optimizer or candidate.optimizer is optimizer:
                return candidate
        expected, received = "an optimizer returned by configure_optimizers", type(optimizer).__name__
        raise ConfigurationError(explain(expected, received, "opt = self.optimizers()"))


_OF_A_RUN = "opt = self.optimizers() in training_step"


class LightningOptimizer:
    """Wraps one of the user's optimizers; attributes it lacks are those of the raw optimizer.

    Args:
        optimizer: the raw optimizer.
        life: what it shares with the others of its run. ``configure_optimizers`` may leave it out: it returns
            the raw optimizer by that.

    Attributes:
        optimizer: the raw `torch.optim.Optimizer`.
        phase: where its gradients are in their life.
        applied: whether the last `step` updated parameters (an fp16 overflow skips it).
        step_count: steps that were applied.
        skipped_steps: steps that were skipped because a gradient overflowed.
        zeroed_at: `step_count` when the gradients were last zeroed; below -1 before that.

    Example:
        >>> opt = self.optimizers()
        >>> type(opt.optimizer).__name__, opt.param_groups[0]["lr"], opt.step_count
        ('SGD', 0.1, 0)
    """

    _life: GradientLife
    _backend: Backend

    def __init__(self, optimizer: Optimizer, life: GradientLife | None = None) -> None:
        self.optimizer = optimizer
        self.phase = Phase.EMPTY
        self.applied = False
        self.step_count, self.skipped_steps, self.zeroed_at = 0, 0, -2
        self._stepping = False
        self._zeros: list[Any] | None = None  # versions of the gradients that zero_grad filled with zeros
        if life is not None:
            self._life, self._backend = life, life.backend

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not there yet: unpickling, or __init__ failed
            raise AttributeError(name)
        if name in ("_life", "_backend"):
            raise ProtocolError(explain("an optimizer of a run", "one that was wrapped by hand", _OF_A_RUN))
        return getattr(self.optimizer, name)

    def __repr__(self) -> str:
        position = next((i for i, o in enumerate(self._life.optimizers) if o is self), "?")
        return f"optimizer {position} ({type(self.optimizer).__name__})"

    # Without a setter, which would change the wrapper alone.
    param_groups = property(lambda self: self.optimizer.param_groups, doc="The raw groups, to be changed in place.")

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters of all groups, in order."""
        return self._backend.parameters_of(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the accumulated gradients; they are zeros afterwards if `set_to_none` is False.

        Example:
            >>> opt.zero_grad()
        """
        for hook in self._life.hooks["on_before_zero_grad"]:
            hook(self.optimizer)
        self._backend.zero_grad(self, set_to_none)
        self._zeros = None if set_to_none else self._backend.gradient_versions(self)
        self.phase, self.zeroed_at = Phase.EMPTY, self.step_count

    def clip_gradients(self, value: float, algorithm: Literal["norm", "value"] = "norm") -> Tensor:
        """Finalize, then clip the gradients in place; see `LightningModule.clip_gradients`.

        Example:
            >>> self.manual_backward(self.net(batch).square().mean())
            >>> norm = opt.clip_gradients(0.1, "norm")
        """
        if algorithm not in ("norm", "value"):
            fix = "self.clip_gradients(opt, gradient_clip_val=1.0, gradient_clip_algorithm='norm')"
            raise ConfigurationError(explain("gradient_clip_algorithm 'norm' or 'value'", repr(algorithm), fix))
        value = check_clip_value(value)
        if self.phase is Phase.STEPPED:
            raise ProtocolError(CLIP_AFTER_STEP.format(optimizer=self))
        if self.phase is not Phase.FINALIZED:
            self.finalize()
        return self._backend.clip_gradients(self, value, algorithm)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters from the gradients.

        Args:
            closure: makes the loss, zeroes and computes the gradients with ``manual_backward``, and
                returns the loss. It is called once, except by optimizers that evaluate it several
                times (`torch.optim.LBFGS`).

        Returns:
            Without `closure`, whether the step was applied (bool). With one, its loss, as in torch;
            `applied` tells the rest.

        Raises:
            ProtocolError: if nothing was accumulated since the last step.

        Example:
            >>> self.manual_backward(self.net(batch).square().mean())
            >>> opt.step()
            True
        """
        if closure is not None:
            return self._step_with(closure)
        if self.phase is not Phase.FINALIZED:
            self.finalize()
        for hook in self._life.hooks["on_before_optimizer_step"]:
            hook(self.optimizer)
        self._stepping = True
        try:
            _, applied = self._backend.step(self)
        finally:
            self._stepping = False
        self._record(applied)
        return applied

    def _step_with(self, closure: Callable[[], Any]) -> Any:
        def evaluate() -> Any:
            if self.phase is Phase.FINALIZED:  # the optimizer has used these, and asks again
                self.phase = Phase.STEPPED
            with torch.enable_grad(), self._backend.forward_context():
                loss = closure()
            self.finalize()
            for hook in self._life.hooks["on_before_optimizer_step"]:
                hook(self.optimizer)
            return loss

        backend = self._backend
        try:
            if backend.capabilities.reevaluating_closures and not backend.precision.loss_scaling:
                self._stepping = True
                loss, applied = backend.step(self, evaluate)
            else:
                loss = evaluate()
                self._stepping = True
                _, applied = backend.step(self)
        finally:
            self._stepping = False
        self._record(applied)
        return loss

    def _record(self, applied: bool) -> None:
        self.phase = Phase.STEPPED
        self.applied = applied
        if applied:
            self.step_count += 1
            self._life.stepped = True
        else:
            self.skipped_steps += 1

    def finalize(self) -> None:
        """Make the gradients true (averaged over ranks, unscaled). Does nothing the second time.

        Raises:
            ProtocolError: if there are none, or if the backend never saw them.

        Example:
            >>> self.manual_backward(self.net(batch).square().mean())
            >>> opt.finalize()
            >>> norm = self.net.weight.grad.norm()  # of what the step will use
        """
        if self.phase is Phase.FINALIZED:
            return
        if self.phase is not Phase.ACCUMULATED:
            self._accept_unseen_gradients()
        self._life.in_backward = True  # a backend may make gradients here, too
        try:
            self._backend.finalize_gradients(self)
        finally:
            self._life.in_backward = False
        if not self._backend.has_gradients(self):
            raise ProtocolError(NOTHING_ACCUMULATED.format(optimizer=self, phase=self.phase.value))
        self.phase = Phase.FINALIZED

    def _accept_unseen_gradients(self) -> None:
        """Let gradients pass that no ``manual_backward`` made, if nothing is lost by that here."""
        only_zeros = self._zeros is not None and self._zeros == self._backend.gradient_versions(self)
        if self.phase is Phase.STEPPED or only_zeros or not self._backend.has_gradients(self):
            raise ProtocolError(NOTHING_ACCUMULATED.format(optimizer=self, phase=self.phase.value))
        lost = self._backend.unseen_gradient()
        text = UNSEEN.format(optimizer=self, lost=lost or "loss scaling and averaging over processes elsewhere")
        if lost is not None:
            raise ProtocolError(text)
        self._life.warn_once(text)

    def guard(self, lost: str) -> Iterator[Any]:
        """Make a raw ``step`` and a direct ``loss.backward()`` raise; `lost` is what they would miss."""

        def refuse_step(*_: Any) -> None:
            if not self._stepping:
                raise ProtocolError(RAW_STEP.format(optimizer=self, lost=lost))

        def refuse_backward(_: Tensor) -> None:
            if not self._life.in_backward:
                raise ProtocolError(UNSEEN.format(optimizer=self, lost=lost))

        yield self.optimizer.register_step_pre_hook(refuse_step)
        # One parameter stands for all: a hook on each would cost a Python call per gradient.
        first = next((p for p in self._backend.leaves_of(self) if p.requires_grad and p.is_leaf), None)
        if first is not None:
            yield first.register_post_accumulate_grad_hook(refuse_backward)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Let only this optimizer's parameters require gradients inside the context.

        Args:
            sync_grad: False says that the gradients made here are only accumulated. xtrain
                communicates when a gradient is first needed, so both values train the same.

        Example:
            >>> with opt.toggle_model():
            ...     self.manual_backward(self.net(batch).square().mean())
        """
        self._life.toggles.push(self)
        try:
            yield
        finally:
            self._life.toggles.pop(self)
