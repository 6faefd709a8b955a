"""Do all ranks train the same thing? Asked at set-up and at the end of each epoch; details only if they differ."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from xtrain.collectives import Collectives
from xtrain.contract import OptimizerHandle
from xtrain.errors import ConfigurationError, ProtocolError, explain

T = TypeVar("T")

_CHUNK = 2**26  # bytes that are sent at once
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_COLUMNS = 61


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
    parameters = dict(module.named_parameters())
    share({**(parameters if broadcast_start else {}), **dict(module.named_buffers())}, collectives)
    if not broadcast_start:
        name, rank = _first_difference({n: _digest(p) for n, p in parameters.items()}, collectives)
        if name:
            fix = "seed_everything(42) before the module is made, or backend_options={'broadcast_start': True}"
            received = f"another '{name}' on rank {rank} than on rank 0"
            raise ConfigurationError(explain("replicas that start with the same parameters", received, fix))


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


def check_replicas(module: nn.Module, collectives: Collectives) -> None:
    """Make sure that the ranks still have the same parameters and buffers, batch statistics aside.

    Args:
        module: the user's module.
        collectives: of this run.

    Raises:
        ProtocolError: on every rank, with the first tensor that differs.
    """
    tensors = {**dict(module.named_parameters()), **{name: owner[key] for name, owner, key in common_buffers(module)}}
    name, rank = _first_difference(_fingerprints(tensors), collectives)
    if name:
        raise ProtocolError(
            explain(
                "replicas with the same parameters and buffers at the end of an epoch",
                f"another '{name}' on rank {rank} than on rank 0",
                "what is made or set inside the run takes rank 0's values: "
                "parameter.data.copy_(self.trainer.broadcast(parameter.data)); "
                "Trainer(check_replicas='off') if ranks may differ",
            )
        )


def share(tensors: Mapping[str, Tensor], collectives: Collectives) -> None:
    """Give every rank the values of rank 0.

    Args:
        tensors: by name; of the same shapes, types and layouts on every rank.
        collectives: of this run.

    Raises:
        ConfigurationError: for a tensor that cannot be sent or written, with its name.
    """
    waiting: list[tuple[str, Tensor, Tensor]] = []  # name, where to write, bytes
    size = 0
    for name, tensor in tensors.items():
        for part in _explained(name, _dense_parts, tensor):
            bits = _explained(name, _bytes_of, part)
            if waiting and (waiting[-1][2].device != bits.device or size > _CHUNK):
                _share_chunk(waiting, collectives)
                waiting, size = [], 0
            waiting.append((name, part, bits))
            size += bits.numel()
    if waiting:
        _share_chunk(waiting, collectives)


@torch.no_grad()
def _share_chunk(chunk: list[tuple[str, Tensor, Tensor]], collectives: Collectives) -> None:
    received = collectives.broadcast(torch.cat([bits for _, _, bits in chunk]))
    for (name, part, own), bits in zip(chunk, received.split([bits.numel() for _, _, bits in chunk]), strict=True):
        if not torch.equal(own, bits):  # what is equal may be a tensor that nobody can write to
            _explained(name, Tensor.copy_, part, bits.clone().view(part.dtype).view(part.shape))


def common_buffers(module: nn.Module) -> list[tuple[str, dict[str, Any], str]]:
    """Return ``(name, holder, key)`` of the buffers that ranks should have in common: all but batch statistics."""
    return [
        (f"{prefix}.{key}" if prefix else key, owner._buffers, key)
        for prefix, owner in module.named_modules()
        if not isinstance(owner, _NormBase)
        for key, buffer in owner._buffers.items()
        if buffer is not None
    ]


class CommonBuffers:
    """Buffers that a forward changes: after a step they are those of rank 0, as in DistributedDataParallel.

    Args:
        module: the user's module.
        collectives: of this run.
    """

    def __init__(self, module: nn.Module, collectives: Collectives) -> None:
        self._module, self._collectives = module, collectives
        self._found = common_buffers(module)
        self._seen = self._versions()
        self.stale = False

    def _versions(self) -> list[Any]:
        held = [holder.get(key) for _, holder, key in self._found]
        return [(id(b), -1 if b is None or b.is_inference() else b._version) for b in held]

    def changed(self) -> bool:
        """Return whether any of them was changed here since they were last the same."""
        return bool(self._found) and self._versions() != self._seen

    def refresh(self) -> None:
        """Take rank 0's on every rank, if any rank was heard to have changed one."""
        if not self.stale:
            return
        self.stale = False
        self._found = common_buffers(self._module)
        share({name: holder[key] for name, holder, key in self._found}, self._collectives)
        self._seen = self._versions()


def _describe(module: nn.Module) -> Iterator[str]:
    yield f"module {type(module).__name__}"
    for name, parameter in module.named_parameters():
        frozen = "" if parameter.requires_grad else ", frozen"
        yield f"parameter {name}: {_explained(name, _form, parameter)}{frozen}"
    for name, buffer in module.named_buffers():
        yield f"buffer {name}: {_explained(name, _form, buffer)}"


def _form(tensor: Tensor) -> str:
    layout = "" if tensor.layout is torch.strided else f", {tensor.layout} with {tensor._nnz()} values"
    return f"shape {tuple(tensor.shape)}, {tensor.dtype}{layout}"


def _explained(name: str, work: Callable[..., T], *tensors: Tensor) -> T:
    """Return what `work` returns for `tensors`; an error of torch becomes one that has their name."""
    try:
        return work(*tensors)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        received = f"'{name}', which torch refuses: {str(error).splitlines()[0]}"
        fix = f"a plain tensor as '{name}', made in full before the fit; or devices=1"
        raise ConfigurationError(explain("tensors that ranks can send each other", received, fix)) from error


def _dense_parts(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that `tensor` consists of, to be read and written in place."""
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _check_lines(lines: list[str], collectives: Collectives) -> None:
    digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=32).digest()
    if len(set(collectives.meet("compare modules and optimizers", digest))) == 1:
        return
    everyone = collectives.gather_json(lines, "tell what differs")
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


def _first_difference(fingerprints: Mapping[str, str], collectives: Collectives) -> tuple[str, int]:
    """Return the first name that has another fingerprint on some rank, and that rank; an empty name for none."""
    lines = [f"{name} {fingerprint}" for name, fingerprint in fingerprints.items()]
    whole = hashlib.blake2b("\n".join(lines).encode(), digest_size=32).digest()
    if len(set(collectives.meet("compare replicas", whole))) == 1:
        return "", 0
    everyone = [dict(pairs) for pairs in collectives.gather_json(list(fingerprints.items()), "tell what differs")]
    names = list(dict.fromkeys(name for theirs in everyone for name in theirs))
    odd = ((n, r) for n in names for r, theirs in enumerate(everyone) if theirs.get(n) != everyone[0].get(n))
    return next(odd)


def _digest(tensor: Tensor) -> str:
    """Return a fingerprint of the bits of `tensor`, of any layout."""
    parts = [_bytes_of(part).cpu().numpy().tobytes() for part in _dense_parts(tensor)]
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def _fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return cheap fingerprints: sums of the bits as whole numbers, which are exact in any order. One read for all."""
    sums: list[Tensor] = []
    for name, tensor in tensors.items():
        sums.append(_explained(name, _sum_of_bits, tensor))
    if not sums:
        return {}
    device = sums[0].device
    found = torch.stack([s.to(device) for s in sums]).cpu()
    return {name: f"{tuple(tensors[name].shape)} {pair.tolist()}" for name, pair in zip(tensors, found, strict=True)}


@torch.no_grad()
def _sum_of_bits(tensor: Tensor) -> Tensor:
    """Return two sums over the words of `tensor`: a plain one, and one that depends on their places."""
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for part in _dense_parts(tensor):
        real = torch.view_as_real(part.resolve_conj()) if part.is_complex() else part
        words = real.contiguous().view(-1).view(_WORDS[real.element_size()])
        columns = words[: words.numel() // _COLUMNS * _COLUMNS].view(-1, _COLUMNS).sum(0, dtype=torch.int64)
        places = torch.arange(1, _COLUMNS + 1, device=tensor.device)
        total += torch.stack([words.sum(dtype=torch.int64), (columns * places).sum()])
    return total
