"""A training without numbers: every operation is asked for its shapes, bytes and FLOPs, and computes nothing."""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from xtrain.callbacks.base import Callback
from xtrain.compat.backends import FALLBACK
from xtrain.precision import resolve_precision
from xtrain.registry import get_backend_class
from xtrain.rehearsal.subject import Subject
from xtrain.tensors import move_module

_ATEN = torch.ops.aten
_ANSWER = _ATEN._local_scalar_dense.default
_FORMULAS = {
    **flop_registry,
    # What attention becomes on the CPU: the same products.
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}
_VIEWS = ("view", "alias", "detach", "expand", "permute", "transpose", "select", "slice", "squeeze", "unsqueeze")


class Meter(TorchDispatchMode):
    """Counts live storages by kind, FLOPs of matrix products, convolutions and attention, and bytes read and written.

    Attributes:
        live: bytes by kind, now.
        peak: `live` when its sum was largest.
        flops: of all operations so far; a multiplication and an addition are two.
        traffic: bytes that operations have read and written, each by itself.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[str, int] = defaultdict(int)
        self.peak: dict[str, int] = {}
        self.flops = self.traffic = 0
        self._most = 0
        self._kinds: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is _ANSWER and isinstance(args[0], torch._subclasses.FakeTensor):
            return _some_number(args[0].dtype)
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        count = _FORMULAS.get(function._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        written = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        for tensor in written:
            self.note(tensor, "activations")
        if not function._overloadpacket.__name__.startswith(_VIEWS):
            read = (tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor))
            self.traffic += sum(tensor.numel() * tensor.element_size() for tensor in (*read, *written))
        return result

    def note(self, tensor: Tensor, kind: str) -> None:
        """Count the memory of `tensor` as `kind`, from now until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        old = self._kinds.get(key)
        if old is None:
            weakref.finalize(storage, self._freed, key)
        elif kind == "activations":  # the result is a view, or written in place
            return
        else:
            self.live[old[0]] -= old[1]
        self._kinds[key] = (kind, size)
        self.live[kind] += size
        if sum(self.live.values()) > self._most:
            self._most, self.peak = sum(self.live.values()), dict(self.live)

    def _freed(self, key: int) -> None:
        kind, size = self._kinds.pop(key)
        self.live[kind] -= size

    def forget_peak(self) -> None:
        """Begin anew with the peak."""
        self._most = 0


def _some_number(dtype: torch.dtype) -> float | int | bool:
    """Return what a tensor without numbers is said to hold: a count of steps must not be 0, no check has failed."""
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 1


class _Kinds(Callback):
    """Tells the meter which tensors are gradients and states, and asks `between` after each step of an optimizer."""

    def __init__(self, meter: Meter, between: Callable[[str], None]) -> None:
        self._meter, self._between = meter, between

    def on_train_start(self, trainer: Any, module: nn.Module) -> None:
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._gradient)
        for wrapped in trainer.life.optimizers:
            name = repr(wrapped)
            wrapped.optimizer.register_step_post_hook(lambda optimizer, *_, name=name: self._stepped(optimizer, name))

    def on_train_batch_end(self, trainer: Any, module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.progress.batches <= 1:  # states were made in the middle of it
            self._meter.forget_peak()

    def _gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._meter.note(parameter.grad, "gradients")

    def _stepped(self, optimizer: Any, name: str) -> None:
        for state in optimizer.state.values():
            for tensor in tree_leaves(state):
                if isinstance(tensor, Tensor):
                    self._meter.note(tensor, "state")
        self._between(name)


@dataclass(frozen=True)
class Measured:
    """What `measure` found.

    Attributes:
        meter: after the training.
        steps: training steps.
        optimizers: FLOPs from one optimizer's step to the next one's, counted for that next one.
        fake: whether nothing was computed.
    """

    meter: Meter
    steps: int
    optimizers: dict[str, int]
    fake: bool


def measure(
    subject: Subject, steps: int, precision: str = "32-true", resize: Callable[[Tensor], Tensor] | None = None
) -> Measured:
    """Train for `steps` steps on tensors without numbers; on real ones where the module asks for numbers.

    Args:
        subject: the user's module and data.
        steps: training batches.
        precision: of the run; those with fp16 are measured as those with bf16, whose sizes are the same.
        resize: changes every tensor of a batch.
    """
    precision = precision.replace("16-", "bf16-") if precision.startswith("16-") else precision
    try:
        return _measured(subject, steps, precision, resize, fake=True)
    except Exception:  # shapes that depend on numbers, numpy, an operator that has no fake: they are computed then
        return _measured(subject, steps, precision, resize, fake=False)


def _measured(subject: Subject, steps: int, precision: str, resize: Any, fake: bool) -> Measured:
    real = subject.module()
    batches = subject.batches(real, steps)
    meter = Meter()
    flops: dict[str, int] = defaultdict(int)
    last = 0

    def between(name: str) -> None:
        nonlocal last
        flops[name] += meter.flops - last
        last = meter.flops

    with _numberless(real, batches, precision, fake) as (module, batches, backend):
        if resize is not None:
            batches = tree_map(lambda leaf: resize(leaf) if isinstance(leaf, Tensor) else leaf, batches)
        for tensor in (*module.parameters(), *module.buffers()):
            meter.note(tensor, "parameters")
        for leaf in tree_leaves(batches[0]):  # one is on the device at a time
            if isinstance(leaf, Tensor):
                meter.note(leaf, "activations")
        own = replace(subject, data=None if batches[0] is None else batches)
        with meter:
            trainer = own.fit(module, steps, [_Kinds(meter, between)], backend=backend, precision=precision)
    return Measured(meter, trainer.progress.batches, dict(flops), fake)


@contextmanager
def _numberless(module: nn.Module, batches: Sequence[Any], precision: str, fake: bool) -> Iterator[tuple[Any, ...]]:
    """Give the module, its batches and a backend that leaves the module where it is."""
    base = get_backend_class(FALLBACK)
    if not fake:
        yield module, batches, base()
        return
    move_module(module, torch.device("cpu"), resolve_precision(precision).parameter_dtype)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        batches = tree_map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, list(batches))
        stack.enter_context(mode)
        copied = copy.deepcopy(module)
        backend = type("Numberless", (base,), {"setup_module": lambda self, module: None})()
        yield copied, batches, backend
