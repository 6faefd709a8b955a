"""A user's module in shards: how it gets there, how it is looked at whole, and how it gets back."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate

from xtrain.errors import ConfigurationError, explain

from .groups import LayerGroup, ShardedParameter, begin, detach, local, snapshot
from .policy import Policy, check_exists, check_shardable, find_layers, find_networks, find_plain
from .stale import make_fresh, make_stale


class ShardedModule:
    """Shards the networks of a module, each layer by layer, and takes that back when the run ends.

    Args:
        module: the user's, whole, on the CPU or on `device`, in its final dtype.
        mesh: all processes of the run.
        device: of this process.
        policy: which modules are groups of their own, see `find_layers`.
        mixed: dtypes of what FSDP2 gathers and reduces.
        offload: where shards live between their uses.
        methods: methods beside forward that use parameters, as ``"network.method"``.

    Attributes:
        groups: what is gathered and reduced together, in the order of the module.
    """

    def __init__(
        self,
        module: nn.Module,
        mesh: DeviceMesh,
        device: torch.device,
        policy: Policy,
        mixed: MixedPrecisionPolicy,
        offload: OffloadPolicy,
        methods: Iterable[str],
    ) -> None:
        check_exists(module)
        self._module, self._device = module, device
        networks = find_networks(module)
        parts = {name: [*find_layers(module, name, n, policy), n] for name, n in networks.items()}
        plain = find_plain(module, list(parts.values()))
        named = list(module.named_parameters())
        check_shardable(module, len(named) - len(plain), plain)
        originals = {(id(m), n): p for m in module.modules() for n, p in m.named_parameters(recurse=False)}
        self._before: dict[nn.Module, tuple[type, set[str]]] = {}
        for network_parts in parts.values():
            for part in network_parts:
                if plain.issuperset(part.parameters()):  # also a layer of two networks, which comes twice
                    continue
                _make_contiguous(part)
                self._before[part] = snapshot(part)
                fully_shard(
                    part,
                    mesh=mesh,
                    reshard_after_forward=True,  # also the root: what stays gathered misses toggles
                    mp_policy=mixed,
                    offload_policy=offload,
                    ignored_params=plain,
                )
        _move_rest(module, device, plain)
        _begin_all(n for n in networks.values() if n in self._before)
        self.groups = [LayerGroup(m, name, originals) for name, m in module.named_modules() if m in self._before]
        self.by_shard: dict[Tensor, tuple[LayerGroup, ShardedParameter]] = {
            p.sharded: (group, p) for group in self.groups for p in group.parameters
        }
        names = {p: name for name, p in named}
        self._originals = {p.original: names[p.original] for _, p in self.by_shard.values()}
        self._methods = [_register(module, method) for method in methods]
        for group in self.groups:  # once on every rank, so that each has the leaves that autograd knows
            group.gather()
            group.release()
        make_stale(self._originals)

    def knew(self, parameter: Tensor) -> bool:
        """Return whether `parameter` stood in the module before it was sharded."""
        return parameter in self._originals

    @contextmanager
    def full_parameters(self, module: nn.Module) -> Iterator[None]:
        """Put whole parameters into `module`; what is written to them inside is kept."""
        inside = {id(m) for m in module.modules()}
        swapped: list[tuple[ShardedParameter, nn.Parameter]] = []
        for group in self.groups:
            group.release()
            for parameter in group.parameters:
                if any(id(place) in inside for place, _ in parameter.places()):
                    whole = nn.Parameter(gathered(parameter.sharded), parameter.sharded.requires_grad)
                    _put(parameter, whole)
                    swapped.append((parameter, whole))
        try:
            yield
        finally:
            for parameter, whole in swapped:
                _put(parameter, parameter.sharded)
                write_back(parameter.sharded, whole)

    def restore(self, optimizers: Iterable[Any]) -> None:
        """Leave a plain module with the parameters the user made, on the CPU where the device may be too small.

        After an exception in one of several processes the others do not take part in a gather any
        more; then everything stays as it is, so that the exception is what the user sees.

        Args:
            optimizers: the run's, raw; their groups get the user's parameters back.
        """
        failed = sys.exc_info()[0] is not None and torch.distributed.get_world_size() > 1
        if failed:
            return
        back: dict[Tensor, nn.Parameter] = {}
        for group in self.groups:
            group.unwatch()
            group.release()
            for parameter in group.parameters:
                make_fresh(parameter.original, gathered(parameter.sharded).cpu(), parameter.sharded.requires_grad)
                _put(parameter, parameter.original)
                back[parameter.sharded] = parameter.original
        for module, before in self._before.items():
            detach(module, before)
        for undo in self._methods:
            undo()
        for optimizer in optimizers:
            for held in optimizer.param_groups:
                held["params"] = [back.get(p, p) for p in held["params"]]


def _make_contiguous(module: nn.Module) -> None:
    for parameter in module.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()


def _move_rest(module: nn.Module, device: torch.device, plain: set[nn.Parameter]) -> None:
    """Move what FSDP2 leaves alone: parameters that stay whole, and buffers."""
    for parameter in plain:
        parameter.data = parameter.data.to(device)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.device != device:
                part._buffers[name] = buffer.to(device)


def _begin_all(networks: Iterable[nn.Module]) -> None:
    try:
        for network in networks:
            begin(network)
    except AssertionError as error:  # parameters of several dtypes in one group
        fix = "self.net.float() in __init__, or FSDP(shard=...) with a group for each dtype"
        raise ConfigurationError(explain("one dtype among the parameters of a layer", str(error), fix)) from error


def _register(module: nn.Module, spelling: str) -> Any:
    """Let a method gather parameters as forward does; return what takes that back."""
    path, _, name = spelling.rpartition(".")
    parts: Mapping[str, nn.Module] = dict(module.named_modules())
    if not path or path not in parts or not callable(getattr(parts[path], name, None)):
        expected = f"methods of networks of {type(module).__name__}"
        raise ConfigurationError(explain(expected, repr(spelling), "FSDP(methods=['vae.encode', 'vae.decode'])"))
    part = parts[path]
    register_fsdp_forward_method(part, name)
    return lambda: vars(part).pop(name, None)


def _put(parameter: ShardedParameter, value: nn.Parameter) -> None:
    for module, name in parameter.places():
        module._parameters[name] = value


@torch.no_grad()
def gathered(tensor: Tensor) -> Tensor:
    """Return a whole copy of a tensor in shards, on its device; every rank must call it."""
    assert isinstance(tensor, DTensor)
    whole: Tensor = tensor.full_tensor()
    return whole.detach().clone()  # with one process it would be the shard itself


@torch.no_grad()
def part_of(whole: Tensor, like: Tensor) -> DTensor:
    """Return `whole`, which is the same on every rank, in the shards of `like`; nothing is sent."""
    assert isinstance(like, DTensor)
    mesh, device = like.device_mesh, like.to_local().device
    spread = DTensor.from_local(whole.detach().to(device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return spread.redistribute(placements=like.placements)


def write_back(sharded: Tensor, whole: Tensor) -> None:
    """Write this rank's part of `whole`, which is the same on every rank, into `sharded`."""
    local(sharded).copy_(part_of(whole, sharded).to_local())
