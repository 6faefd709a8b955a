"""How large the numbers of a training are: products that leave a range, gradients by size, updates that round away."""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from xtrain.callbacks.base import Callback
from xtrain.rehearsal.places import NOWHERE, Place, current_place, is_users, place_of_layer

HALF = torch.float16
LARGEST = torch.finfo(HALF).max
VANISHES = -25  # below 2**-25 a number is rounded to zero in fp16

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm, _ATEN.convolution}
_OF_BACKWARD = {_ATEN.convolution_backward}


class Overflow(NamedTuple):
    """A product outside of the range.

    Attributes:
        step: from 1.
        layer: as in ``named_modules``; empty if no layer of torch ran.
        place: its line.
        size: the largest number, by its absolute value.
    """

    step: int
    layer: str
    place: Place
    size: float


class NumberWatch(Callback):
    """Looks at the numbers of a fit, while `products` is on.

    Args:
        module: that is trained.
        rounding: whether products in fp32 are rounded to fp16; else only those that are in fp16 are looked at.

    Attributes:
        rounding: as given.
        overflow: the first product of a forward that leaves the range of fp16.
        loses: whether the loss scaler skipped the step with that product.
        scale: the last loss scale; 0.0 if there is none.
        good: steps in a row, up to the last one, that were not skipped.
        largest: the largest gradient, of parameters and of what layers return.
        gradients: for each layer how many gradients have which exponent (those that are zero have none).
        updates: for each layer how many numbers of its parameters were to change.
        stuck: and how many of them stay as they are in bf16.
        sizes: for each layer how many numbers its own parameters have.
    """

    def __init__(self, module: nn.Module, *, rounding: bool = True) -> None:
        self.rounding = rounding
        self.overflow: Overflow | None = None
        self.loses, self.scale, self.good, self.largest = False, 0.0, 0, 0.0
        self.gradients: dict[str, Counter[int]] = defaultdict(Counter)
        self.updates: Counter[str] = Counter()
        self.stuck: Counter[str] = Counter()
        self.sizes: Counter[str] = Counter()
        self.products = _Products(self)
        self._module, self._layer, self._step = module, "", 0
        self._before: dict[int, Tensor] = {}
        self._names = {id(p): name.rpartition(".")[0] for name, p in module.named_parameters()}
        for name, layer in module.named_modules():
            self.sizes[name] = sum(p.numel() for p in layer._parameters.values() if p is not None)
            if layer._parameters and not is_users(_file_of(layer)):
                layer.register_forward_pre_hook(partial(self._enter, name))
                layer.register_forward_hook(self._leave)

    def _enter(self, name: str, layer: nn.Module, arguments: Any) -> None:
        self._layer = name

    def _leave(self, layer: nn.Module, arguments: Any, output: Any) -> None:
        self._layer = ""
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self.note_gradient)

    def on_train_start(self, trainer: Any, module: nn.Module) -> None:
        """Follow the gradients and the updates of parameters."""
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.register_hook(partial(self._count, self._names.get(id(parameter), "")))
        for wrapped in trainer.life.optimizers:
            wrapped.optimizer.register_step_pre_hook(self._keep)
            wrapped.optimizer.register_step_post_hook(self._compare)

    def on_train_batch_start(self, trainer: Any, module: nn.Module, batch: Any, batch_idx: int) -> None:
        """Begin a step."""
        self._step, self._layer, self.scale = self._step + 1, "", _scale_of(trainer)

    def on_train_batch_end(self, trainer: Any, module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note whether the step was skipped."""
        before, self.scale = self.scale, _scale_of(trainer)
        skipped = self.scale < before
        self.good = 0 if skipped else self.good + 1
        if self.overflow is not None and self.overflow.step == self._step:
            self.loses = skipped

    def is_of_training(self) -> bool:
        """Return whether what runs now is of the user's step, and not the arithmetic of an optimizer."""
        return self._step > 0 and (torch.is_grad_enabled() or bool(self._layer))

    def note_overflow(self, size: float) -> None:
        """Note the layer that runs now."""
        if self.overflow is None:
            place = place_of_layer(self._module, self._layer) if self._layer else current_place()
            self.overflow = Overflow(self._step, self._layer, place or NOWHERE, size)

    def note_gradient(self, gradient: Tensor) -> None:
        """Note how large a gradient is."""
        values = _values(gradient)
        size = float(values.abs().max()) if values.numel() else 0.0
        if math.isfinite(size):
            self.largest = max(self.largest, size)

    def _count(self, layer: str, gradient: Tensor) -> None:
        self.note_gradient(gradient)
        values = _values(gradient)
        exponents, counts = torch.frexp(values[values != 0]).exponent.unique(return_counts=True)
        self.gradients[layer].update(dict(zip(exponents.tolist(), counts.tolist(), strict=True)))

    def _keep(self, optimizer: Any, *_: Any) -> None:
        self._before = {id(p): p.detach().clone() for p in _parameters(optimizer)}

    def _compare(self, optimizer: Any, *_: Any) -> None:
        for parameter in _parameters(optimizer):
            layer, before = self._names.get(id(parameter), ""), self._before.get(id(parameter), parameter)
            moves = parameter.detach() != before
            start = before.bfloat16()
            stays = (start.float() + (parameter.detach() - before).float()).bfloat16() == start
            self.updates[layer] += int(moves.sum())
            self.stuck[layer] += int((moves & stays).sum())


class _Products(TorchDispatchMode):
    """Rounds what goes into matrix products and convolutions, and what comes out, to fp16 and back."""

    def __init__(self, watch: NumberWatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet = function._overloadpacket
        # With gradients on it is a forward again, of activation checkpointing, or one that is differentiated twice.
        backward = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
        if packet in _OF_BACKWARD or (backward and packet in _PRODUCTS):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, Tensor):
                    self._watch.note_gradient(tensor)
            return result
        if packet not in _PRODUCTS or not self._watch.is_of_training():
            return function(*args, **(kwargs or {}))
        args, kwargs = tree_map(self._rounded, (args, kwargs or {}))
        return tree_map(self._rounded, function(*args, **(kwargs or {})))

    def _rounded(self, value: Any) -> Any:
        """Return what fp16 makes of a tensor; what leaves the range is noted and kept, so that training goes on."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if value.dtype == HALF:
            if bool(value.isinf().any()):
                self._watch.note_overflow(math.inf)
            return value
        if not self._watch.rounding:
            return value
        half = value.to(HALF)
        lost = half.isinf() & value.isfinite()
        if bool(lost.any()):
            self._watch.note_overflow(float(value[lost].abs().max()))
        return torch.where(lost, value, half.to(value.dtype))


def _scale_of(trainer: Any) -> float:
    scaler = getattr(trainer.backend, "scaler", None)
    return 0.0 if scaler is None else float(scaler.current_scale)


def _values(gradient: Tensor) -> Tensor:
    values = gradient.detach()
    values = values.coalesce().values() if values.is_sparse else values
    return (torch.view_as_real(values) if values.is_complex() else values).float()


def _parameters(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.is_floating_point()]


def _file_of(layer: nn.Module) -> str:
    return getattr(sys.modules.get(type(layer).__module__), "__file__", None) or "<unknown>"
