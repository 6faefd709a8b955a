"""The loss scale of ``16-mixed``: one scale, any number of optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from xtrain.checks import check_scaler_options
from xtrain.contract import OptimizerHandle
from xtrain.errors import ConfigurationError, explain

Restored: TypeAlias = list[tuple[OptimizerHandle, list[Any]]]  # optimizers, with the versions of their gradients


class LossScaler:
    """Scales losses so that fp16 gradients do not underflow: one scale for all optimizers of a training step.

    `torch.amp.GradScaler.update` resets the state of every optimizer, so with two optimizers it
    unscales the second one twice, or grows and backs off twice per step. Here overflows are collected
    until the boundary of the training step, where the scale changes once. The scaler alone knows whose
    gradients carry it: gradients that outlive a change of the scale (accumulated ones, or one loss that
    fed two optimizers) are multiplied by the exact ratio, and gradients left over from an earlier step
    get their scale back before a scaled loss adds to them. Scales are powers of two unless the user
    chose other factors, so nothing is rounded.

    Args:
        device_type: where the gradients are, ``"cuda"`` or ``"cpu"``.
        holders_of: returns objects whose ``grad`` is a gradient of an optimizer; default: its parameters.
        versions_of: returns what changes with the gradients of an optimizer, see `Backend.gradient_versions`.
        **options: those of `torch.amp.GradScaler`: ``init_scale`` (65536), ``growth_factor`` (2),
            ``backoff_factor`` (0.5), ``growth_interval`` (2000 training steps).

    Raises:
        ConfigurationError: for an unknown option or a value that means nothing.
    """

    def __init__(
        self,
        device_type: str,
        holders_of: Callable[[OptimizerHandle], Iterable[Any]] = lambda optimizer: optimizer.parameters,
        versions_of: Callable[[OptimizerHandle], list[Any]] | None = None,
        **options: Any,
    ) -> None:
        values = check_scaler_options(options)
        self._growth, self._backoff = float(values["growth_factor"]), float(values["backoff_factor"])
        self._interval = int(values["growth_interval"])
        self._scale = torch.tensor(float(values["init_scale"]), device=device_type)
        self.current_scale = float(values["init_scale"])  # on the host: the overflow flag is read at every step anyway
        self._good_steps = 0
        self._stepped = self._overflowed = False
        self._holders_of, self._versions_of = holders_of, versions_of or self._versions_of_holders
        self._unscaled: dict[OptimizerHandle, list[Tensor]] = {}  # with what says whether they overflowed

    def begin(self) -> None:
        """Forget the optimizers of an earlier run; the scale goes on."""
        self._unscaled.clear()

    def _versions_of_holders(self, optimizer: OptimizerHandle) -> list[Any]:
        return [None if h.grad is None else (id(h.grad), h.grad._version) for h in self._holders_of(optimizer)]

    def scale(self, loss: Tensor) -> Tensor:
        """Return `loss` times the scale, a half-precision 0-dim loss as fp32."""
        return loss * self._scale

    def restore(self, optimizers: Iterable[OptimizerHandle]) -> Restored:
        """Give true gradients their scale back, before a scaled loss adds to them; `finish_restore` ends it.

        Args:
            optimizers: all of the run; those that no backward can reach now are passed over.
        """
        restored = []
        for optimizer in optimizers:
            if optimizer in self._unscaled and any(p.requires_grad for p in optimizer.parameters):
                self.multiply(optimizer, 1)
                restored.append((optimizer, self._versions_of(optimizer)))
        return restored

    def finish_restore(self, restored: Restored) -> None:
        """Take the scale off what the backward after `restore` did not reach; the rest carries it now."""
        for optimizer, versions in restored:
            if self._versions_of(optimizer) == versions:
                self.multiply(optimizer, -1)
            else:
                self.forget(optimizer)

    def multiply(self, optimizer: OptimizerHandle, power: int) -> None:
        """Multiply the gradients of `optimizer` by the scale (`power` 1), or divide them by it (-1)."""
        rescale_gradients(self._holders_of(optimizer), self.current_scale**power)

    def unscale(self, optimizer: OptimizerHandle) -> list[Tensor]:
        """Divide the gradients of `optimizer` that carry the scale by it, in place, and note whether they are finite.

        Returns:
            What is noted, 0 or 1 per device and dtype; a backend that holds parts of gradients puts in what
            the other ranks found. Nothing where there are no gradients.
        """
        if optimizer in self._unscaled:
            return self._unscaled[optimizer]
        inverse, found = 1.0 / self._scale.double(), []
        for gradients in _by_kind(self._holders_of(optimizer)):
            found.append(torch.zeros((), device=gradients[0].device))
            on_device = inverse.to(gradients[0].device, torch.float32)
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, found[-1], on_device)
        if found:
            self._unscaled[optimizer] = found
        return found

    def may_step(self, optimizer: OptimizerHandle) -> bool:
        """Return whether the unscaled gradients of `optimizer` are finite, which it is to step on.

        Reading the flag waits for the device, as `torch.amp.GradScaler.step` does.
        """
        overflowed = any(flag.item() for flag in self._unscaled[optimizer])
        self.record(overflowed)
        return not overflowed

    def record(self, overflowed: bool) -> None:
        """Count a step, of which `may_step` or the backend itself found out whether gradients overflowed."""
        self._stepped = True
        self._overflowed |= overflowed

    def note_unscaled(self, optimizer: OptimizerHandle) -> None:
        """Note that the backend itself took the scale off the gradients of `optimizer`."""
        self._unscaled[optimizer] = []

    def forget(self, optimizer: OptimizerHandle) -> None:
        """Note that gradients of `optimizer` carry the scale from now on: they were dropped, or are to be made."""
        self._unscaled.pop(optimizer, None)

    def update(self, optimizers: Iterable[OptimizerHandle]) -> None:
        """Grow or back off the scale if any optimizer stepped since the last call, and rescale what carries it.

        Args:
            optimizers: all of the run.
        """
        if not self._stepped:
            return
        ratio = 1.0
        self._good_steps = 0 if self._overflowed else self._good_steps + 1
        if self._overflowed:
            ratio = self._backoff
        elif self._good_steps == self._interval:
            ratio, self._good_steps = self._growth, 0
        self._stepped = self._overflowed = False
        if ratio != 1.0:
            self._set_scale(self.current_scale * ratio)
            for optimizer in optimizers:
                if optimizer not in self._unscaled:
                    rescale_gradients(self._holders_of(optimizer), ratio)

    def _set_scale(self, scale: float) -> None:
        self.current_scale = scale
        self._scale.fill_(scale)

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and the number of good steps since it last changed."""
        return {"scale": self.current_scale, "good_steps": self._good_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        scale = float(state_dict["scale"])
        if not (math.isfinite(scale) and scale > 0):
            raise ConfigurationError(explain("a loss scale that is finite and positive", scale))
        self._good_steps = int(state_dict["good_steps"])
        self._set_scale(scale)


def _by_kind(parameters: Iterable[Any]) -> Iterable[list[Tensor]]:
    """Return the gradients in lists of one device and dtype; of sparse ones their values, each index once."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()  # a sum of duplicates may overflow, and must be seen
        values = parameter.grad._values() if parameter.grad.is_sparse else parameter.grad
        values = torch.view_as_real(values) if values.is_complex() else values
        kinds.setdefault((values.device, values.dtype), []).append(values)
    return kinds.values()


def rescale_gradients(holders: Iterable[Any], ratio: float) -> None:
    """Multiply the existing gradients of `holders` by `ratio`, in place.

    Their versions stay: the backend's own bookkeeping is no edit.
    """
    gradients = [holder.grad for holder in holders if holder.grad is not None]
    if gradients and ratio != 1.0:
        torch._foreach_mul_([(g._values() if g.is_sparse else g).data for g in gradients], ratio)
