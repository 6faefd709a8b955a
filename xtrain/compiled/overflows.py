"""Steps of ``16-mixed`` without reading on the host whether a gradient overflowed, until the training step ends.

While a step is recorded every optimizer steps, and what an overflow should have left alone is put back by
`torch.where`, below Python: so it is part of the operations, and of every replay. After the training step the flags
are read at once, and counters and the loss scale follow as if each had been read in its time.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import _disable_current_modes

from xtrain.compiled.known import Outputs
from xtrain.compiled.recording import Problem, is_of_user, user_location
from xtrain.compiled.watching import Watch
from xtrain.guard import Seen
from xtrain.run.state import Run

_COUNTED = ("applied", "skipped_steps", "step_count")


class Overflows:
    """The steps of optimizers in one training step that an overflow would have skipped.

    Args:
        run: whose step it is.
        watch: what the step reads and writes.

    Attributes:
        steps: the wrapped optimizers that stepped, each with its flag.
        slots: the outputs of these flags, once they have a place.
    """

    def __init__(self, run: Run, watch: Watch) -> None:
        self._run, self._watch = run, watch
        self.scaler = scaler_of(run)
        self.steps: list[tuple[Any, Tensor]] = []
        self.slots: list[tuple[Any, int]] = []
        self.left: list[tuple[Any, list[int] | None, bool]] = []
        self._kept: list[tuple[dict[Any, Any], Any, dict[str, Any] | None, Tensor]] = []
        self._on_nothing = False

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Let nothing inside the context wait for a flag."""
        if self.scaler is None:
            yield
            return
        optimizers = self._run.life.optimizers
        with ExitStack() as stack:
            for place, name, own in (
                (self.scaler, "may_step", self._may_step),
                (self.scaler, "multiply", self._multiply),
                *((o, "step", self._answering(o)) for o in optimizers),
            ):
                vars(place)[name] = own
                stack.callback(vars(place).pop, name)
            for optimizer in optimizers:
                stack.callback(setattr, optimizer, "__class__", type(optimizer))
                optimizer.__class__ = self._telling(type(optimizer))
                chosen = _Chosen(self, optimizer)
                stack.callback(optimizer.optimizer.register_step_pre_hook(chosen.before).remove)
                stack.callback(optimizer.optimizer.register_step_post_hook(chosen.after).remove)
            yield

    def _may_step(self, optimizer: Any) -> bool:
        flags = self.scaler._unscaled[optimizer]
        flag = flags[0] if len(flags) == 1 else torch.stack([f.to(flags[0].device) for f in flags]).amax()
        self.steps.append((optimizer, flag))
        return True

    def _multiply(self, optimizer: Any, power: int) -> None:
        """Put the scale onto gradients, or take it off, by the tensor that holds it: a number would freeze."""
        for holder in self.scaler._holders_of(optimizer):
            if holder.grad is not None:
                scale = self.scaler._scale.to(holder.grad.device)
                values = holder.grad._values() if holder.grad.is_sparse else holder.grad
                with _unsafe_preserve_version_counter(values):  # the backend's bookkeeping is no edit
                    values.mul_(scale if power > 0 else scale.reciprocal())

    def _answering(self, optimizer: Any) -> Callable[..., Any]:
        """Return ``optimizer.step``, which reads the flag only for somebody who looks at what it returns."""
        step = optimizer.step

        def call(*args: Any, **kwargs: Any) -> Any:
            before = len(self.steps)
            result = step(*args, **kwargs)
            self._on_nothing |= not vars(optimizer)["applied"]
            if result is not True or len(self.steps) == before or _is_dropped(sys._getframe(1)):
                return result
            return self._ask(optimizer, "applied", result)

        return call

    def _telling(self, kind: Any) -> Any:
        """Return a subclass of `LightningOptimizer` whose counters are true for the step that looks at them."""

        def read(wrapped: Any, name: str) -> Any:
            value = kind.__getattribute__(wrapped, name)
            return self._ask(wrapped, name, value) if name in _COUNTED and is_of_user(sys._getframe(1)) else value

        return type(kind.__name__, (kind,), {"__getattribute__": read, "__module__": kind.__module__})

    def _ask(self, optimizer: Any, name: str, value: Any) -> Any:
        what = "whether the loss scaler let an optimizer step was asked in the step"
        self._watch.problems.append(Problem(what, f"ask opt.{name} in on_train_batch_end", user_location()))
        with _disable_current_modes():
            skipped = [bool(flag > 0) for stepped, flag in self.steps if stepped is optimizer]
        if name == "applied":
            return not skipped[-1] if skipped else value
        return value + sum(skipped) * (1 if name == "skipped_steps" else -1)

    def keep(self, outputs: Outputs) -> None:
        """Make outputs of the flags."""
        if self.scaler is not None:
            self.slots = [(optimizer, outputs.slot(flag).number) for optimizer, flag in self.steps]
            for optimizer in self._run.life.optimizers:
                flags = self.scaler._unscaled.get(optimizer)
                slots = None if flags is None else [outputs.slot(flag).number for flag in flags]
                self.left.append((optimizer, slots, optimizer.seen is not None))

    def settle(self) -> None:
        """Read the flags of the step that was recorded, and go on from what they say."""
        if self.steps:
            values = self._run.backend.read_scalars([flag for _, flag in self.steps])
            flags = [value > 0 for value in values]
            settle(self._run, [optimizer for optimizer, _ in self.steps], flags, self._on_nothing)
            read = dict(zip(map(id, (flag for _, flag in self.steps)), flags, strict=True))
            for state, parameter, before, flag in reversed(self._kept):
                if read[id(flag)]:  # what is no tensor, or was made in the step
                    state.pop(parameter) if before is None else state[parameter].clear()
                    state[parameter].update(before) if before is not None else None

    def replayed(self, out: Sequence[Tensor]) -> None:
        """The same after a replay with the outputs `out`."""
        if not self.left:
            return
        for optimizer, slots, is_seen in self.left:
            optimizer.seen = Seen(self._run.backend, optimizer) if is_seen else None
            self.scaler.forget(optimizer)
            if slots is not None:
                self.scaler._unscaled[optimizer] = [out[number] for number in slots]
        values = self._run.backend.read_scalars([out[number] for _, number in self.slots])
        settle(self._run, [optimizer for optimizer, _ in self.slots], [v > 0 for v in values], self._on_nothing)


class _Chosen:
    """What one optimizer's step leaves: the old values where the flag says so.

    A step that calls the step of its base class runs the hooks twice: the outer ones count.
    """

    def __init__(self, overflows: Overflows, wrapped: Any) -> None:
        self._overflows, self._wrapped = overflows, wrapped
        self._depth = 0
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        flag = self._overflows.steps[-1][1]
        with torch.no_grad():
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                held = optimizer.state.get(parameter)
                before = None if held is None else dict(held)
                self._overflows._kept.append((optimizer.state, parameter, before, flag))
                tensors = [parameter, *(v for v in (before or {}).values() if isinstance(v, Tensor))]
                self._pairs += [(tensor, tensor.clone()) for tensor in tensors]

    def after(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        overflowed = self._overflows.steps[-1][1] > 0
        with torch.no_grad():
            for tensor, old in self._pairs:
                tensor.copy_(torch.where(overflowed.to(tensor.device), old, tensor))
        self._pairs.clear()


def _is_dropped(caller: Any) -> bool:
    """Return whether the frame `caller` does nothing with what its current call returns."""
    following = (i for i in dis.get_instructions(caller.f_code) if i.offset > caller.f_lasti)
    return next(following).opname == "POP_TOP"


def scaler_of(run: Run) -> Any:
    """Return the loss scaler of the run's backend, None without one."""
    return getattr(run.backend, "scaler", None)


def settle(run: Run, optimizers: Sequence[Any], overflowed: Sequence[bool], on_nothing: bool) -> None:
    """Correct counters that took every step for applied.

    Args:
        run: whose step it was.
        optimizers: those that stepped, in order.
        overflowed: of each, whether a gradient did.
        on_nothing: whether an optimizer was to step without gradients, which counts.
    """
    scaler = scaler_of(run)
    for optimizer, skipped in zip(optimizers, overflowed, strict=True):
        scaler.record(skipped)
        optimizer.applied = not skipped
        if skipped:
            optimizer.step_count, optimizer.skipped_steps = optimizer.step_count - 1, optimizer.skipped_steps + 1
            optimizer.zeroed_at = min(optimizer.zeroed_at, optimizer.step_count)
    if optimizers:
        run.life.stepped = on_nothing or not all(overflowed)
