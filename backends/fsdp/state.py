"""Training state of a sharded module as whole CPU tensors by name, and back into shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from xtrain.checkpoint import named
from xtrain.checkpoint.parts import Part
from xtrain.contract import OptimizerHandle

from .groups import ShardedParameter, local
from .sharding import ShardedModule, gathered, part_of


def training_state(
    module: nn.Module, optimizers: Sequence[OptimizerHandle], sharded: ShardedModule, whole: bool, first: bool
) -> dict[str, Any]:
    """Return what `xtrain.contract.Backend.training_state` describes; `first` is true on rank 0."""
    state = named.copied(named.training_state(module, optimizers), partial(_whole, first) if whole else _parts)
    return {**(state if first or not whole else {}), "gradients": _gradients(module, optimizers, sharded)}


def _whole(keep: bool, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies on the CPU, of shards gathered ones; every rank must call it, and those that `keep` get them."""
    copies = []
    for tensor in tensors:
        whole = gathered(tensor) if isinstance(tensor, DTensor) else tensor.detach()
        copies.append(whole.to("cpu", copy=True) if keep else torch.empty(0))
    return copies


def _parts(tensors: Sequence[Tensor]) -> list[Any]:
    return [_part(tensor) if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def _part(tensor: DTensor) -> Part:
    """Return this rank's rows of a tensor, whose first dimension FSDP2 splits."""
    shape, numbers = tuple(tensor.shape), local(tensor).detach().reshape(-1)
    _, offset = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
    return Part(numbers, offset[0] * torch.Size(shape[1:]).numel() if numbers.numel() else 0, shape)


def _gradients(module: nn.Module, optimizers: Sequence[OptimizerHandle], sharded: ShardedModule) -> dict[str, Any]:
    """Return this rank's gradients: its own, and what was reduced already, which is everybody's."""
    found: dict[str, Any] = {}
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    for label, optimizer in zip(named.names_of_optimizers(optimizers), optimizers, strict=True):
        if not named.keeps_gradients(optimizer):
            continue
        for index, parameter in enumerate(optimizer.parameters):
            known = sharded.by_shard.get(parameter)
            gradient = parameter.grad if known is None else _whole_gradient(known[1])
            if gradient is not None:
                name = names.get(parameter, f"{label}.{index}")
                found.setdefault(label, {})[name] = gradient.detach().to("cpu", copy=True)
    return found


def _whole_gradient(parameter: ShardedParameter) -> Tensor | None:
    own, reduced = parameter.local_gradient, parameter.sharded.grad
    if reduced is None:
        return own
    whole = gathered(reduced)
    return whole if own is None else whole.to(own.device, own.dtype) + own


def load_training_state(
    module: nn.Module, optimizers: Sequence[OptimizerHandle], state: Mapping[str, Any], sharded: ShardedModule
) -> None:
    """Restore optimizers and gradients, see `xtrain.contract.Backend.load_training_state`."""
    named.load_training_state(module, optimizers, {**state, "gradients": {}}, _place)
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    for label, optimizer in zip(named.names_of_optimizers(optimizers), optimizers, strict=True):
        for index, parameter in enumerate(optimizer.parameters):
            gradient = state["gradients"].get(label, {}).get(names.get(parameter, f"{label}.{index}"))
            if gradient is None:
                continue
            known = sharded.by_shard.get(parameter)
            leaf = parameter if known is None else known[1].whole
            leaf.grad = gradient.to(leaf.device, leaf.dtype, copy=True)


def _place(value: Tensor, parameter: Tensor, key: str, group: Mapping[str, Any]) -> Tensor:
    if isinstance(parameter, DTensor) and value.shape == parameter.shape and value.dim() > 0:
        return part_of(value.clone(), parameter)
    return named.torch_place(value, parameter, key, group)
