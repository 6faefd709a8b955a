"""From a recording to a function that does the same: functional, without dead code, compiled by inductor."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from xtrain.compiled.recording import Recording

Replay = Callable[..., list[Tensor]]


def missing_compiler(device: torch.device, whole_step: bool) -> str | None:
    """Return what compiling for `device` lacks on this machine, with the package to install, or None."""
    on_host = torch.empty(0, device=device).is_cpu
    if whole_step and not on_host:  # captured in a graph, and not compiled
        return None
    if not any(map(which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))):
        return "no C++ compiler was found (apt-get install g++, or conda install gxx)"
    if not on_host and find_spec("triton") is None:
        return "triton is missing (pip install triton)"
    return None


def _norms(tensors: list[Tensor], ord: float = 2, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [torch.ops.aten.linalg_vector_norm(tensor, ord, dtype=dtype) for tensor in tensors]


def _unscaled(gradients: list[Tensor], found: Tensor, inverse: Tensor) -> tuple[list[Tensor], Tensor]:
    finite = [torch.isfinite(gradient).all() for gradient in gradients]
    overflowed = torch.where(torch.stack(finite).all(), found, torch.ones_like(found))
    return [(gradient * inverse).to(gradient.dtype) for gradient in gradients], overflowed


_SIMPLER: dict[Any, Callable[..., Any]] = {  # which inductor would not compile
    torch.ops.aten._foreach_norm.Scalar: _norms,
    torch.ops.aten._amp_foreach_non_finite_check_and_unscale.default: _unscaled,
}


def load_compiler() -> None:
    """Import torch's compiler, whose modules warn of each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import_module("torch._inductor.compile_fx")


def functional(recording: Recording) -> fx.GraphModule:
    """Return the step as a function of its inputs, which it updates in place at its end only."""
    from torch.fx.experimental.proxy_tensor import make_fx

    gm = fx.GraphModule(torch.nn.Module(), recording.graph)
    real = [tensor.detach() for tensor in recording.inputs]
    with torch.no_grad(), FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in real]
        trace = make_fx(torch.func.functionalize(gm, remove="mutations_and_views"), decomposition_table=_SIMPLER)
        return _without_dead_code(trace(*fakes))


def _without_dead_code(gm: fx.GraphModule) -> fx.GraphModule:
    """Remove what nobody looks at; random numbers are drawn all the same, so that later ones are eager's."""

    def kept(node: fx.Node) -> bool:
        schema = getattr(node.target, "_schema", None)
        effect = schema is not None and (
            schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags  # type: ignore[union-attr]
        )
        return node.op in ("placeholder", "output") or effect

    gm.graph.eliminate_dead_code(kept)
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.detach_copy.default):
        node.replace_all_uses_with(node.args[0])  # nothing has a graph here, and nothing is written twice
    for node in gm.graph.nodes:  # gradients of weights that nobody uses, as of D in the loss of G
        if node.target is torch.ops.aten.convolution_backward.default:
            used = {user.args[1] for user in node.users}
            node.args = (*node.args[:-1], [bool(m) and i in used for i, m in enumerate(node.args[-1])])
    gm.graph.eliminate_dead_code(kept)
    gm.recompile()
    return gm


def compiled(gm: fx.GraphModule, inputs: list[Tensor]) -> Replay:
    """Return `gm` compiled by inductor for the CPU.

    Random numbers are torch's own, in the order of the step: only then are they the same as without a compiler.
    """
    load_compiler()
    import torch._inductor.config as config
    from torch._inductor.compile_fx import compile_fx

    settings: dict[str, Any] = {
        "fallback_random": True,
        "reorder_for_locality": False,
        "layout_optimization": False,
        "cpp_wrapper": True,
    }
    with torch.no_grad(), config.patch(settings):
        replay: Any = compile_fx(gm, [tensor.detach() for tensor in inputs])
        return replay  # type: ignore[no-any-return]
