"""Do all ranks train the same thing, from the same start? Asked once at set-up; details only if they differ."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from xtrain.collectives import Collectives
from xtrain.contract import OptimizerHandle
from xtrain.errors import ConfigurationError, explain

from .process_group import gather_objects


def check_module(module: nn.Module, collectives: Collectives, broadcast_start: bool) -> None:
    """Make sure that `module` is the same on all ranks, in structure and in values.

    Buffers are those of rank 0 afterwards: batch statistics of an earlier run rightly differ.

    Args:
        module: the user's module, on any device.
        collectives: of this run.
        broadcast_start: take rank 0's parameters, too, instead of refusing different ones.

    Raises:
        ConfigurationError: with the first difference.
    """
    _check_lines(list(_describe(module)), collectives)
    tensors = [*module.buffers(), *(module.parameters() if broadcast_start else ())]
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(collectives.broadcast(tensor))
    if not broadcast_start:
        _check_values(dict(module.named_parameters()), collectives)


def check_optimizers(module: nn.Module, optimizers: Sequence[OptimizerHandle], collectives: Collectives) -> None:
    """Make sure that all ranks have the same optimizers for the same parameters.

    Raises:
        ConfigurationError: with the first difference.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    lines = [f"{len(optimizers)} optimizers"]
    for index, optimizer in enumerate(optimizers):
        lines.append(f"optimizer {index}: {type(optimizer.optimizer).__name__}")
        for number, group in enumerate(optimizer.optimizer.param_groups):
            held = " ".join(names.get(id(p), f"unnamed {tuple(p.shape)}") for p in group["params"])
            lines.append(f"optimizer {index}, group {number}: {held}")
    _check_lines(lines, collectives)


def _describe(module: nn.Module) -> Iterator[str]:
    yield f"module {type(module).__name__}"
    for name, parameter in module.named_parameters():
        frozen = "" if parameter.requires_grad else ", frozen"
        yield f"parameter {name}: shape {tuple(parameter.shape)}, {parameter.dtype}{frozen}"
    for name, buffer in module.named_buffers():
        yield f"buffer {name}: shape {tuple(buffer.shape)}, {buffer.dtype}"


def _check_lines(lines: list[str], collectives: Collectives) -> None:
    digest = hashlib.blake2b("\n".join(lines).encode()).hexdigest()
    if len(set(gather_objects(digest, collectives.world_size))) == 1:
        return
    everyone = gather_objects(lines, collectives.world_size)
    rank = next(rank for rank, theirs in enumerate(everyone) if theirs != everyone[0])
    for ours, theirs in zip([*everyone[0], "nothing more"], [*everyone[rank], "nothing more"], strict=False):
        if ours != theirs:
            break
    raise ConfigurationError(
        explain(
            "every rank to train the same module with the same optimizers",
            f"'{ours}' on rank 0, but '{theirs}' on rank {rank}",
            "__init__ and configure_optimizers that do not depend on the rank, or on a file of one machine",
        )
    )


def _check_values(parameters: dict[str, Tensor], collectives: Collectives) -> None:
    digests = {name: _digest(parameter) for name, parameter in parameters.items()}
    whole = hashlib.blake2b("".join(digests.values()).encode()).hexdigest()
    if len(set(gather_objects(whole, collectives.world_size))) == 1:
        return
    everyone = gather_objects(digests, collectives.world_size)
    rank = next(rank for rank, theirs in enumerate(everyone) if theirs != everyone[0])
    name = next(name for name, digest in everyone[0].items() if everyone[rank][name] != digest)
    raise ConfigurationError(
        explain(
            "replicas that start with the same parameters",
            f"another '{name}' on rank {rank} than on rank 0",
            "seed_everything(42) before the module is made, or backend_options={'broadcast_start': True}",
        )
    )


def _digest(tensor: Tensor) -> str:
    """Return a fingerprint of the bits of `tensor`."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return hashlib.blake2b(
        flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"", digest_size=16
    ).hexdigest()
