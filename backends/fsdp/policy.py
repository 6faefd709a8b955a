"""Which networks are sharded, and in which layers: what is gathered and reduced together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from xtrain.errors import ConfigurationError, explain

Policy = Literal["layers", "children"] | Callable[[str, nn.Module], bool]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def check_policy(policy: Policy) -> None:
    """Refuse what is neither a name of a policy nor a function.

    Raises:
        ConfigurationError: with a function that would do.
    """
    if policy not in ("layers", "children") and not callable(policy):
        fix = "FSDP(shard=lambda name, module: isinstance(module, Block))"
        raise ConfigurationError(explain("shard='layers', 'children' or a function", repr(policy), fix))


def find_networks(module: nn.Module) -> dict[str, nn.Module]:
    """Return the networks of `module` by name: its children with parameters, each a root of its own.

    A child without a forward, such as a ModuleList, stands for its own children. A network inside another
    one (a pipeline that holds it) is not listed: it becomes a layer of the other.
    """
    networks = dict(_expand(module, ""))
    inner = {id(part) for network in networks.values() for part in network.modules() if part is not network}
    return {name: network for name, network in networks.items() if id(network) not in inner}


def _expand(parent: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in parent.named_children():
        if next(child.parameters(), None) is None:
            continue
        if _has_forward(child):
            yield prefix + name, child
        else:
            yield from _expand(child, f"{prefix}{name}.")


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def find_layers(module: nn.Module, name: str, network: nn.Module, policy: Policy) -> list[nn.Module]:
    """Return the modules of `network` that are groups of their own; the rest of it is one more.

    Args:
        module: the user's whole module, for networks of its that lie inside `network`.
        name: of the network.
        network: one of `find_networks`.
        policy: ``"layers"`` takes the items of the outermost lists and sequences, or the children where there
            are none; ``"children"`` takes none; a function is asked with name and module.

    Returns:
        Innermost first.
    """
    own_roots = [child for _, child in _expand(module, "")]
    inner = [part for part in own_roots if part is not network and any(part is m for m in network.modules())]
    if callable(policy):
        chosen = [part for path, part in network.named_modules() if path and policy(f"{name}.{path}", part)]
    elif policy == "layers":
        chosen = [part for part in _items(network) if next(part.parameters(), None) is not None]
    else:
        chosen = []
    wanted = {id(part) for part in (*chosen, *inner) if _has_forward(part)}
    return [part for part in reversed(list(network.modules())) if id(part) in wanted and part is not network]


def _items(network: nn.Module) -> list[nn.Module]:
    found = list(_outermost_items(network))
    return found or list(network.children())


def _outermost_items(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(module, _CONTAINERS) and _has_forward(child):
            yield child
        else:
            yield from _outermost_items(child)


def find_plain(module: nn.Module, groups: list[list[nn.Module]]) -> set[nn.Parameter]:
    """Return the parameters that stay whole on every rank: what FSDP cannot shard, or could not keep tied.

    Args:
        module: the user's.
        groups: for each network its layers and, last, itself.

    Returns:
        Parameters directly on `module`, those without dimensions, and those of two groups.
    """
    owners: Counter[nn.Parameter] = Counter()
    for parts in groups:
        layers = {id(part) for part in parts}
        for part in parts:
            owners.update(set(_own_parameters(part, layers)))
    return {p for p in module.parameters() if owners[p] != 1 or p.dim() == 0}


def _own_parameters(part: nn.Module, layers: set[int]) -> Iterator[nn.Parameter]:
    yield from part.parameters(recurse=False)
    for child in part.children():
        if id(child) not in layers:
            yield from _own_parameters(child, layers)


def check_exists(module: nn.Module) -> None:
    """Refuse a module whose tensors do not exist yet.

    Raises:
        ConfigurationError: with the line that makes them.
    """
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            fix = "self.net(torch.zeros(1, 3, 8, 8)) in __init__: one batch tells a lazy layer its shape"
            raise ConfigurationError(explain("parameters with a shape before they are sharded", f"{name}, lazy", fix))
        if parameter.device == torch.device("meta"):
            fix = "layer.to_empty(device='cpu'); layer.reset_parameters() in configure_model"
            raise ConfigurationError(explain("parameters with values before they are sharded", f"{name} on meta", fix))


def check_shardable(module: nn.Module, sharded: int, plain: set[nn.Parameter]) -> None:
    """Refuse a module of which FSDP would shard nothing.

    Raises:
        ConfigurationError: with what is missing.
    """
    if plain and not sharded:
        raise ConfigurationError(
            explain(
                "a network to shard: a child module with parameters and a forward",
                f"{type(module).__name__}, whose {len(plain)} parameters all stay whole",
                "self.net = Net() in __init__, self.net(x) in training_step; or backend='cpu' or 'cuda'",
            )
        )
