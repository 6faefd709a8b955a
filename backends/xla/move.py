"""Moves tensors to the XLA device without replacing the objects that hold them.

`Module.to` makes new Parameters for an XLA device: tied weights come apart, and an optimizer that was
built before trains parameters nobody uses. Here each tensor object stays and only its contents are
swapped, so ties, optimizers, hooks and the user's own references need no care.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from xtrain.errors import ConfigurationError, explain
from xtrain.tensors import move_module as to_device

from .runtime import Runtime

Layout = Callable[[Tensor], Any] | None


def move_module(module: nn.Module, runtime: Runtime, dtype: torch.dtype | None = None, layout: Layout = None) -> None:
    """Move the parameters and buffers of `module` to the device, in one transfer.

    Args:
        module: its tensors keep their identity, ties, gradients and hooks.
        runtime: knows the device.
        dtype: of floating-point tensors afterwards; None leaves them.
        layout: how a tensor is split over a mesh.

    Raises:
        ConfigurationError: for a lazy module that has not seen a batch, or a tensor on a third device.
    """
    named = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    tensors = {id(t): t for name, t in named if _movable(name, t, runtime.device)}
    _move(list(tensors.values()), runtime, dtype, layout)
    to_device(module, runtime.device, dtype)  # for modules that keep tensors elsewhere and override _apply


def move_optimizer(optimizer: Optimizer, runtime: Runtime, counts: bool = True, layout: Layout = None) -> None:
    """Move parameters that no module holds, and the state, in one transfer each.

    Args:
        optimizer: its state may come from a run on another device.
        runtime: knows the device.
        counts: whether step counters go along. Where Python reads them they stay on the CPU.
        layout: how a tensor is split over a mesh.
    """
    owned = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    _move([p for p in owned.values() if _movable("a parameter of the optimizer", p, runtime.device)], runtime)
    places = [
        (state, key)
        for state in optimizer.state.values()
        for key, value in state.items()
        if _on_cpu(value) and (counts or key != "step")
    ]
    tensors = [state[key] for state, key in places]
    moved = _to_device(tensors, runtime, layout)
    for (state, key), tensor in zip(places, moved, strict=True):
        state[key] = tensor


def _on_cpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu"


def _movable(name: str, tensor: Tensor, device: torch.device) -> bool:
    if is_lazy(tensor):
        fix = "model(next(iter(loader))) once on the CPU, before Trainer.fit"
        raise ConfigurationError(explain(f"{name} to have a shape", "a lazy module that has seen no batch", fix))
    if tensor.device.type not in ("cpu", device.type):
        fix = f"remove .to({tensor.device.type!r}) from the module; the Trainer moves it"
        raise ConfigurationError(explain(f"{name} on the CPU or on {device}", f"it is on {tensor.device}", fix))
    return True


def _move(tensors: Iterable[Tensor], runtime: Runtime, dtype: torch.dtype | None = None, layout: Layout = None) -> None:
    wanted = [t for t in tensors if t.device.type == "cpu"]
    with torch.inference_mode(False), torch.no_grad():
        grads = [t.grad if t.is_leaf else None for t in wanted]
        held = [grad for grad in grads if grad is not None]
        whole = [_cast(t, dtype) for t in [*wanted, *held]]
        new = _to_device(whole, runtime, layout)
        new_grads = iter(new[len(wanted) :])
        for tensor, grad, moved in zip(wanted, grads, new, strict=False):
            _swap(tensor, moved)
            if grad is not None:
                tensor.grad = next(new_grads)


def _to_device(tensors: list[Tensor], runtime: Runtime, layout: Layout) -> list[Tensor]:
    return runtime.to_device(tensors) if layout is None else runtime.spread(tensors, [layout(t) for t in tensors])


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and dtype is not None else tensor


def _swap(tensor: Tensor, moved: Tensor) -> None:
    """Give the object `tensor` the contents of `moved`. Hooks belong to the contents: they are carried over."""
    moved.requires_grad_(tensor.requires_grad)
    if tensor.is_leaf:
        tensor.grad = None
    hooks, after_accumulation = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    torch._C._swap_tensor_impl(tensor, moved)
    if hooks:
        tensor._backward_hooks = hooks
    if after_accumulation:
        tensor._post_accumulate_grad_hooks = after_accumulation
