"""Precision policies, and the loss scaler for several optimizers.

A policy says in which dtype a module's parameters live and in which its forward runs; it holds no
state. The one stateful part, `LossScaler`, exists for ``16-mixed`` only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from xtrain.errors import ConfigurationError, explain

_NO_CONTEXT = nullcontext()  # holds nothing, so one serves all


@dataclass(frozen=True)
class Precision:
    """How numbers are represented during training.

    Attributes:
        name: the spelling used in `Trainer(precision=...)`.
        parameter_dtype: dtype of floating-point parameters, buffers and inputs; None leaves them.
        autocast_dtype: dtype of the forward's matrix products under autocast; None means no autocast.
        loss_scaling: whether gradients would underflow without a scaled loss (fp16 autocast).
    """

    name: str
    parameter_dtype: torch.dtype | None = None
    autocast_dtype: torch.dtype | None = None
    loss_scaling: bool = False

    def forward_context(self, device_type: str) -> AbstractContextManager[Any]:
        """Return the context of a forward pass on `device_type`.

        Under a mixed policy that is autocast. Its weight cache stays off: a cast made under
        `torch.no_grad` would be reused by a later forward that needs gradients, and that network
        would silently get none (pytorch/pytorch#65766); casts made before an optimizer step would be
        stale after it. Under a true policy, tensors made without a dtype get the policy's.
        """
        if self.parameter_dtype is not None:
            return default_dtype(self.parameter_dtype)
        if self.autocast_dtype is None:
            return _NO_CONTEXT
        return torch.autocast(device_type, dtype=self.autocast_dtype, cache_enabled=False)

    def suspended(self, device_type: str) -> AbstractContextManager[Any]:
        """Return the context of a backward pass or an optimizer step: what `forward_context` set is off."""
        if self.parameter_dtype is not None:
            return default_dtype(torch.float32)
        if self.autocast_dtype is None:
            return _NO_CONTEXT
        return torch.autocast(device_type, enabled=False)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make `dtype` torch's default inside the context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


PRECISIONS: dict[str, Precision] = {
    policy.name: policy
    for policy in (
        Precision("32-true"),
        Precision("16-mixed", autocast_dtype=torch.float16, loss_scaling=True),
        Precision("bf16-mixed", autocast_dtype=torch.bfloat16),
        Precision("bf16-true", parameter_dtype=torch.bfloat16),
        Precision("16-true", parameter_dtype=torch.float16),
    )
}

_ALIASES = {
    "None": "32-true",
    "32": "32-true",
    "fp32": "32-true",
    "16": "16-mixed",
    "fp16": "16-mixed",
    "bf16": "bf16-mixed",
}


def resolve_precision(spelling: str | int | None) -> Precision:
    """Return the policy for `spelling`; Lightning's ``32``, ``16``, ``"bf16"`` and None are understood.

    Raises:
        ConfigurationError: for any other spelling.
    """
    name = _ALIASES.get(str(spelling), str(spelling))
    if name not in PRECISIONS:
        known = ", ".join(map(repr, PRECISIONS))
        raise ConfigurationError(explain(f"a precision out of {known}", repr(spelling), "Trainer(precision='32-true')"))
    return PRECISIONS[name]


class LossScaler(torch.amp.GradScaler):
    """A `torch.amp.GradScaler` whose scale changes once per training step, for all optimizers together.

    `torch.amp.GradScaler.update` resets the state of every optimizer, so with two optimizers it
    unscales the second one twice, or grows and backs off twice per step. Here each optimizer is
    forgotten as soon as it has stepped, overflows are collected, and `update_once` acts on them at
    the boundary of the training step. Gradients that outlive a change of the scale (accumulated
    ones, or one loss that fed two optimizers) are multiplied by the exact ratio: scales are powers
    of two unless the user chose other factors.

    Args:
        device_type: ``"cuda"`` or ``"cpu"``.
        **kwargs: those of `torch.amp.GradScaler`: ``init_scale``, ``growth_factor``,
            ``backoff_factor``, ``growth_interval``.

    Raises:
        ConfigurationError: for an unknown keyword or a value `GradScaler` does not take.
    """

    def __init__(self, device_type: str, **kwargs: Any) -> None:
        unknown = sorted(set(kwargs) - {"init_scale", "growth_factor", "backoff_factor", "growth_interval"})
        if unknown:
            raise ConfigurationError(
                explain(
                    "scaler_kwargs out of init_scale, growth_factor, backoff_factor, growth_interval",
                    ", ".join(unknown),
                    "Trainer(scaler_kwargs={'init_scale': 2.0**16, 'growth_interval': 2000})",
                )
            )
        try:
            super().__init__(device_type, **kwargs)
        except (AssertionError, TypeError) as error:
            raise ConfigurationError(f"scaler_kwargs={kwargs}: {error}") from error
        # The overflow flag is read at every step anyway, so scale and tracker are kept on the host.
        self._host_scale = float(self.get_scale())
        self._good_steps = 0
        self._stepped = self._overflowed = False

    @property
    def current_scale(self) -> float:
        """The scale as a Python float, without asking the device."""
        return self._host_scale

    def may_step(self, optimizer: Optimizer) -> bool:
        """Return whether the unscaled gradients of `optimizer` are finite, which it is to step on.

        Reading the flag waits for the device, as `GradScaler.step` does.
        """
        found = self._per_optimizer_states.pop(id(optimizer))["found_inf_per_device"]
        overflowed = any(flag.item() for flag in found.values())
        self._stepped = True
        self._overflowed |= overflowed
        return not overflowed

    def record(self, overflowed: bool) -> None:
        """Count a step whose gradients the backend unscaled and checked itself."""
        self._stepped = True
        self._overflowed |= overflowed

    def forget(self, optimizer: Optimizer) -> None:
        """Drop what is known about the gradients of `optimizer`, which were zeroed."""
        self._per_optimizer_states.pop(id(optimizer), None)

    def update_once(self) -> float:
        """Grow or back off the scale if any optimizer stepped since the last call.

        Returns:
            The new scale divided by the old one; 1.0 if it did not change.
        """
        if not self._stepped:
            return 1.0
        ratio = 1.0
        self._good_steps = 0 if self._overflowed else self._good_steps + 1
        if self._overflowed:
            ratio = self.get_backoff_factor()
        elif self._good_steps == self.get_growth_interval():
            ratio, self._good_steps = self.get_growth_factor(), 0
        self._stepped = self._overflowed = False
        if ratio != 1.0:
            self._set_scale(self._host_scale * ratio)
        return ratio

    def _set_scale(self, scale: float) -> None:
        # Not GradScaler.update: it would forget overflows of optimizers that have not stepped yet.
        self._host_scale = self._init_scale = scale
        if self._scale is not None:
            self._scale.fill_(scale)

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and the number of good steps since it last changed."""
        return {"scale": self._host_scale, "good_steps": self._good_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        scale = float(state_dict["scale"])
        if not (math.isfinite(scale) and scale > 0):
            raise ConfigurationError(explain("a loss scale that is finite and positive", scale))
        self._good_steps = int(state_dict["good_steps"])
        self._set_scale(scale)


def rescale_gradients(parameters: Iterable[Tensor], ratio: float) -> None:
    """Multiply the existing gradients of `parameters` by `ratio`, in place."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients and ratio != 1.0:
        torch._foreach_mul_(gradients, ratio)
