"""`LightningOptimizer`: the life of a gradient, in the same order on every backend.

    zero_grad -> backward -> finalize -> clip -> step

Finalizing (averaging over ranks, unscaling) happens exactly once per step, when the gradient is
first needed: by `LightningOptimizer.clip_gradients` or by `LightningOptimizer.step`, whichever comes
first. Every optimizer keeps its own phase, so nothing one optimizer does decides for another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from xtrain.checks import check_clip_value
from xtrain.contract import Backend, Phase
from xtrain.errors import (
    CLIP_AFTER_STEP,
    EDITED,
    NOT_IN_GRAD,
    NOTHING_TO_STEP,
    UNSEEN,
    ConfigurationError,
    ProtocolError,
    explain,
)
from xtrain.guard import Seen, check_own_method, is_own_method
from xtrain.life import GradientLife

_OF_A_RUN = "opt = self.optimizers() in training_step"


class LightningOptimizer:
    """Wraps one of the user's optimizers; attributes it lacks are those of the raw optimizer.

    Args:
        optimizer: the raw optimizer.
        life: what it shares with the others of its run. ``configure_optimizers`` may leave it out: it returns
            the raw optimizer by that.
        name: its key in a dict from ``configure_optimizers``.

    Attributes:
        optimizer: the raw `torch.optim.Optimizer`.
        name: its key in a dict from ``configure_optimizers``, else None.
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

    def __init__(self, optimizer: Optimizer, life: GradientLife | None = None, name: str | None = None) -> None:
        self.optimizer, self.name = optimizer, name
        self.phase = Phase.EMPTY
        self.applied = False
        self.step_count, self.skipped_steps, self.zeroed_at = 0, 0, -2
        self._stepping = False
        self._zeros: list[Any] | None = None  # versions of the gradients that zero_grad filled with zeros
        self.seen: Seen | None = None  # its gradients after the last backward, where an edit would lose something
        if life is not None:
            self._life, self._backend = life, life.backend

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not there yet: unpickling, or __init__ failed
            raise AttributeError(name)
        if name in ("_life", "_backend"):
            raise ProtocolError(explain("an optimizer of a run", "one that was wrapped by hand", _OF_A_RUN))
        found = getattr(self.optimizer, name)
        return self._in_a_run(name, found) if is_own_method(name, found) and "_life" in vars(self) else found

    def _in_a_run(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method that only the raw optimizer has; it counts as a step if it changes parameters."""

        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            check_own_method(self, name, self._backend, self._life.lost)
            before, stepping = [p._version for p in self.parameters], self._stepping
            self._stepping = True
            try:
                return method(*args, **kwargs)
            finally:
                self._stepping = stepping
                self._life.stepped |= before != [p._version for p in self.parameters]

        return call

    def allows(self, verb: str) -> bool:
        """Return whether a ``"step"`` of the raw optimizer, or a ``"backward"``, that happens now is xtrain's."""
        return self._stepping if verb == "step" else self._life.in_backward

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle has the raw optimizer, and is free of the run.
        return {**{k: v for k, v in vars(self).items() if k not in ("_life", "_backend")}, "seen": None}

    def __repr__(self) -> str:
        position = next((i for i, o in enumerate(self._life.optimizers) if o is self), "?")
        return f"optimizer {position if self.name is None else self.name!r} ({type(self.optimizer).__name__})"

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
        self.seen = None
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
        if not self._finalize():
            return torch.zeros((), device=self._backend.device)
        return self._backend.clip_gradients(self, value, algorithm)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Update the parameters from the gradients.

        Without a gradient nothing is done, as in PyTorch; the training step counts. A second step on the same
        gradients applies them again.

        Args:
            closure: makes the loss, zeroes and computes the gradients with ``manual_backward``, and
                returns the loss. It is called once, except by optimizers that evaluate it several
                times (`torch.optim.LBFGS`).
            **kwargs: those of the optimizer's own ``step``.

        Returns:
            Without `closure`, whether the step was applied (bool). With one, its loss, as in torch;
            `applied` tells the rest.

        Raises:
            ProtocolError: if gradients were edited, or never seen, where that loses something.
            ConfigurationError: if `closure` cannot be called.

        Example:
            >>> self.manual_backward(self.net(batch).square().mean())
            >>> opt.step()
            True
        """
        if closure is not None:
            return self._step_with(closure, kwargs)
        if not self._finalize():
            self._step_on_nothing()
            return False
        for hook in self._life.hooks["on_before_optimizer_step"]:
            hook(self.optimizer)
        self._stepping = True
        try:
            _, applied = self._backend.step(self, **kwargs)
        finally:
            self._stepping = False
        self._record(applied)
        return applied

    def _step_with(self, closure: Callable[[], Any], kwargs: dict[str, Any]) -> Any:
        if not callable(closure):
            raise ConfigurationError(explain("a closure that can be called", repr(closure), "opt.step(closure)"))
        backend, reached = self._backend, False

        def evaluate() -> Any:
            nonlocal reached
            if self.phase is Phase.FINALIZED:  # the optimizer has used these, and asks again
                self.phase = Phase.STEPPED
            with torch.enable_grad(), backend.forward_context():
                loss = closure()
            if self._finalize():
                reached = True
                for hook in self._life.hooks["on_before_optimizer_step"]:
                    hook(self.optimizer)
            return loss

        try:
            if backend.capabilities.reevaluating_closures and not backend.precision.loss_scaling:
                if self.phase is Phase.ACCUMULATED and not type(self.optimizer).__module__.startswith("torch."):
                    self._finalize()  # it may use these before it calls the closure
                self._stepping = True
                loss, applied = backend.step(self, evaluate, **kwargs)
            else:
                loss, applied = evaluate(), False
                self._stepping = True
                if reached:
                    _, applied = backend.step(self, **kwargs)
        finally:
            self._stepping = False
        if reached:
            self._record(applied)
        else:
            self._step_on_nothing()
        return loss

    def _step_on_nothing(self) -> None:
        """Let a training step count in which there was nothing to step on: a schedule by `global_step` goes on."""
        self.phase, self.applied, self._life.stepped = Phase.EMPTY, False, True
        self._life.count(self)
        self._life.warn_once(NOTHING_TO_STEP.format(optimizer=self))

    def _record(self, applied: bool) -> None:
        self.phase = Phase.STEPPED
        self.applied = applied
        self._life.count(self)
        if applied:
            self.step_count += 1
            self._life.stepped = True
        else:
            self.skipped_steps += 1

    def finalize(self) -> bool:
        """Make the gradients true (averaged over ranks, unscaled), so that ``.grad`` may be read and edited.

        `clip_gradients` and `step` do it by themselves. Gradients written by hand are averaged, too, unless a loss
        is scaled: then nobody knows whether they carry the scale.

        Returns:
            Whether there are any.

        Raises:
            ProtocolError: if gradients were edited, or never seen, where that loses something, or if the backend
                keeps finalized gradients elsewhere.

        Example:
            >>> self.manual_backward(self.net(batch).square().mean())
            >>> opt.finalize()
            True
            >>> norm = self.net.weight.grad.norm()  # of what the step will use
        """
        if not self._backend.capabilities.editable_gradients:
            raise ProtocolError(NOT_IN_GRAD.format(optimizer=self, backend=self._backend.name))
        return self._finalize(by_hand=not self._backend.precision.loss_scaling)

    def _finalize(self, by_hand: bool = False) -> bool:
        """Make the gradients true unless they are, and return whether there are any."""
        if self.phase is Phase.FINALIZED:
            return True
        if self.phase is Phase.EMPTY:
            self._accept_unseen_gradients(by_hand)
        elif self.phase is Phase.ACCUMULATED and self.seen is not None and self.seen.changed(self):
            editable = self._backend.capabilities.editable_gradients
            fix = "self.clip_gradients(opt, gradient_clip_val=1.0)" + (", or opt.finalize() first" if editable else "")
            raise ProtocolError(EDITED.format(optimizer=self, lost=self._life.lost, fix=fix))
        self._life.in_backward = True  # a backend may make gradients here, too
        try:
            self._backend.finalize_gradients(self)
        finally:
            self._life.in_backward = False
        if not self._backend.has_gradients(self):
            return False
        self.phase = Phase.FINALIZED
        return True

    def _accept_unseen_gradients(self, by_hand: bool) -> None:
        """Let gradients pass that no ``manual_backward`` made, if nothing is lost by that here."""
        only_zeros = self._zeros is not None and self._zeros == self._backend.gradient_versions(self)
        if by_hand or only_zeros or not self._backend.has_gradients(self):
            return
        lost = self._life.lost
        text = UNSEEN.format(optimizer=self, lost=lost or "loss scaling and averaging over processes elsewhere")
        if lost is not None:
            raise ProtocolError(text)
        self._life.warn_once(text)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the gradients of `loss` to the parameters of this optimizer alone, whatever else `loss` depends on.

        Args:
            loss: as in `LightningModule.manual_backward`.
            *args: as in `LightningModule.manual_backward`.
            **kwargs: as in `LightningModule.manual_backward`.

        Raises:
            ProtocolError: in automatic optimization, which calls backward itself.

        Example:
            >>> opt.zero_grad()
            >>> opt.backward(self.net(batch).square().mean())
        """
        if self._life.automatic:
            fix = "self.automatic_optimization = False in __init__, or return the loss"
            raise ProtocolError(explain("opt.backward() in manual optimization only", "a call in automatic", fix))
        with self.toggle_model(), self._life.backward(loss, bool(args) or "gradient" in kwargs):
            (self._life.override or self._backend.backward)(loss, *args, **kwargs)

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
