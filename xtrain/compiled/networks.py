"""``Trainer(compile="networks")``: the forward of each child network, compiled on its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from xtrain.compiled.building import load_compiler


def networks_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost submodules of `module` that hold parameters and have a forward."""
    for child in module.children():
        if next(child.parameters(), None) is None:
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from networks_of(child)
        else:
            yield child


def compile_networks(module: nn.Module) -> list[nn.Module]:
    """Let every network of `module` that is not compiled yet run compiled; return these.

    ``net.compile()`` does nothing, silently, to classes of torch such as `nn.Sequential`, whose code the compiler
    skips; so the compiler is given a function of its own that calls the network. Names of parameters stay as they are.
    """
    load_compiler()
    from torch._dynamo.external_utils import wrap_inline

    found = [net for net in networks_of(module) if net._compiled_call_impl is None]
    for net in found:
        net._compiled_call_impl = torch.compile(wrap_inline(net._call_impl))
    return found


@contextmanager
def networks_compiled(module: nn.Module) -> Iterator[None]:
    """Let the networks of `module` run compiled inside the context."""
    compiled = compile_networks(module)
    try:
        yield
    finally:
        for net in {*compiled, *networks_of(module)}:
            net._compiled_call_impl = None
