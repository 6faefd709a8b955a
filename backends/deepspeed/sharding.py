"""ZeRO 3 over a user's module: parameters in shards during a run, whole where they are looked at."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xtrain.checkpoint.parts import Part
from xtrain.errors import ProtocolError, explain

from .engine import make_engine
from .reading import RefusesShards

_HOLD = -1  # no submodule has this id, so DeepSpeed never sees the last user of a held parameter leave


class Attachments:
    """What DeepSpeed attaches to a module and its parameters, and how it is taken off again.

    Args:
        module: as it is before the first engine is made.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = [(p, dict(vars(p))) for p in module.parameters()]
        self._modules = [(m, m._parameters, set(vars(m))) for m in module.modules()]

    def restore(self) -> None:
        """Make the module a plain one; parameters keep their present data."""
        for parameter, attributes in self._parameters:
            vars(parameter).clear()
            vars(parameter).update(attributes)
        for module, parameters, names in self._modules:
            vars(module)["_parameters"] = parameters
            for name in set(vars(module)) - names:
                if name.startswith(_ATTACHED):
                    delattr(module, name)


_ATTACHED = ("ds_", "_ds_", "_external_params", "_original_parameters", "applied_pre_backward", "post_bwd", "pre_bwd")


class ShardedModule:
    """A module whose parameters DeepSpeed gathers for each forward and backward, and releases after it.

    One engine without optimizer does that for the whole module, whoever owns which parameter.
    Small parameters (DeepSpeed's persistence threshold), those that lie directly on the module, outside of
    any layer's forward, and those that a hook reads before one (`torch.nn.utils.weight_norm`) are held whole
    between steps. Whatever the user's code does with one that is not whole is refused: it would be empty.

    Args:
        module: the user's.
        config: a DeepSpeed configuration with stage 3.
    """

    def __init__(self, module: nn.Module, config: dict[str, Any]) -> None:
        self._module = module
        hooked = [m for m in module.modules() if m._forward_pre_hooks]  # they run before DeepSpeed gathers
        self._engine = make_engine(module, config)
        self._zero = self._engine.optimizer
        own = {id(p) for m in (module, *hooked) for p in vars(m)["_parameters"].values() if p is not None}
        named: Iterable[tuple[str, Any]] = list(module.named_parameters())
        self._held = [p for _, p in named if p.ds_persist or id(p) in own]
        for name, parameter in named:
            parameter.__deepcopy__ = partial(_copy_whole, name, parameter)
        self._guards = [m.register_state_dict_pre_hook(_refuse_parts) for m in module.modules()]
        self._reading = RefusesShards({p: name for name, p in named})
        self._reading.__enter__()  # type: ignore[no-untyped-call]  # torch declares no types

    def hold(self) -> None:
        """Gather what is held whole: when all engines are made, and after each step."""
        _gather(self._held)

    def release(self, parameters: Sequence[Tensor]) -> None:
        """Write those of `parameters` that are held back into their shards, before a step on them."""
        mine = {id(p) for p in parameters}
        _partition([p for p in self._held if id(p) in mine])

    def backward(self, run: Callable[[], None], retain_graph: bool) -> None:
        """Call `run`, a backward, and release what it gathered."""
        counts = self._counts() if retain_graph else []  # DeepSpeed expects one backward per forward
        run()
        for attributes, kept in counts:
            attributes.update(kept)
        self._zero.release_backward_leftovers()

    def _counts(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        names = ("applied_pre_backward_ref_cnt", "ds_grads_remaining")
        found = [(vars(m), {n: vars(m)[n] for n in names if n in vars(m)}) for m in self._module.modules()]
        return [(attributes, kept) for attributes, kept in found if kept]

    def step_boundary(self) -> None:
        """Tell DeepSpeed that a training step ends: it prefetches by the order of the last one."""
        self._zero.get_param_coordinator().reset_step()

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """Keep the parameters of `module` whole inside the context, also over backwards in it."""
        every: Iterable[Any] = module.parameters()
        parameters = [p for p in every if _HOLD not in p.ds_active_sub_modules]
        _gather(parameters)
        try:
            yield
        finally:
            _partition(parameters)

    def copies(self, tensors: Sequence[Any], wanted: bool) -> list[Tensor]:
        """Return whole copies of `tensors` on the CPU, gathering one after the other; all ranks call it.

        Args:
            tensors: parameters and buffers of the module.
            wanted: whether this rank needs them; the others only help.
        """
        found: list[Tensor] = []
        for tensor in tensors:
            away = getattr(tensor, "ds_status", None) is not None and _HOLD not in tensor.ds_active_sub_modules
            if away:
                _gather([tensor])
            found.append(tensor.detach().to("cpu", copy=True) if wanted else tensor)
            if away:
                _partition([tensor])
        return found

    def restore(self) -> None:
        """Leave the module whole and without DeepSpeed's hooks.

        After an exception in one of several processes the others do not take part in a gather any
        more; then the parameters stay as they are, so that the exception is what the user sees.
        """
        self._reading.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        for handle in self._guards:
            handle.remove()
        failed = sys.exc_info()[0] is not None and torch.distributed.get_world_size() > 1
        if not failed:
            parameters = list(self._module.parameters())
            _gather(parameters)
            for parameter in parameters:
                parameter.data = parameter.data.clone()
        self._engine.module_forward_pre_hook.remove()
        self._engine.module_forward_post_hook.remove()
        self._engine.destroy()


def parts_of(tensors: Iterable[Any]) -> list[Any]:
    """Return this rank's parts of what is not whole now, parameters of ZeRO 3, and other tensors as they are."""
    return [_part(t) if _is_away(t) else t for t in tensors]


def _is_away(tensor: Any) -> bool:
    return hasattr(tensor, "ds_status") and tensor.ds_status.name == "NOT_AVAILABLE"


def _part(parameter: Any) -> Part:
    size = parameter.ds_tensor.ds_numel  # the last ranks' part is shorter, or nothing
    start = min(size * torch.distributed.get_rank(), parameter.ds_numel)
    own = parameter.ds_tensor.detach().view(-1)[: min(size, parameter.ds_numel - start)]
    return Part(own, start, tuple(parameter.ds_shape))


def _copy_whole(name: str, parameter: Any, memo: dict[int, Any]) -> Any:
    if parameter.numel() == parameter.ds_numel:
        return nn.Parameter.__deepcopy__(parameter, memo)
    raise _not_whole(name, "average = copy.deepcopy(self.net)")


def _refuse_parts(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Refuse a ``state_dict()`` of empty tensors; one of the parameters themselves (`keep_vars`) is what was asked."""
    parameters: Iterable[tuple[str, Any]] = vars(module)["_parameters"].items()
    for name, parameter in () if keep_vars else parameters:
        if parameter is not None and parameter.numel() != getattr(parameter, "ds_numel", parameter.numel()):
            raise _not_whole(prefix + name, "state = self.net.state_dict()")


def _not_whole(name: str, line: str) -> ProtocolError:
    received = "a part of it: ZeRO 3 keeps it in shards between forwards"
    fix = f"with self.trainer.backend.full_parameters(self.net): {line}"
    return ProtocolError(explain(f"a whole {name} to copy", received, fix))


def _gather(parameters: list[Any]) -> None:
    missing = [p for p in parameters if _is_away(p)]
    with torch.inference_mode(False), torch.no_grad():
        if missing:
            missing[0].all_gather(param_list=missing)
    for parameter in parameters:
        parameter.ds_active_sub_modules.add(_HOLD)


def _partition(parameters: list[Any]) -> None:
    for parameter in parameters:
        parameter.ds_active_sub_modules.clear()
    with torch.inference_mode(False), torch.no_grad():
        if parameters:
            parameters[0].partition(param_list=parameters, has_been_updated=True)
