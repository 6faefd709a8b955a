"""One group of FSDP2: what is gathered and reduced together. Everything private of torch's is named here.

Gradients stay on the whole parameter, as this rank's loss made them, until `LayerGroup.reduce`; only then
FSDP2 reduces them into the gradients of the shards. So a step reduces once, however many backwards it ran,
and the gradient of a gradient works: nothing is freed that a later backward may ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from xtrain.errors import ProtocolError, explain

_FSDP = "torch.distributed.fsdp._fully_shard."
_NEEDED = {
    "torch.distributed.fsdp:FSDPModule": "reshard unshard set_reshard_after_forward _get_fsdp_state",
    _FSDP + "_fsdp_param:FSDPParam": "accumulate_unsharded_grad_if_needed init_unsharded_param",
    _FSDP + "_fsdp_param_group:FSDPParamGroup": "unshard pre_backward post_backward finalize_backward is_unsharded",
    _FSDP + "_fsdp_state:FSDPState": "_lazy_init",
    "torch.distributed:_composable_state": "_module_state_mapping",
}


def missing_names() -> list[str]:
    """Return what this backend uses of torch and this torch does not have."""
    missing = []
    for place, names in _NEEDED.items():
        module, _, holder = place.partition(":")
        try:
            found = getattr(import_module(module), holder)
        except (ImportError, AttributeError):
            missing.append(place.replace(":", "."))
            continue
        missing += [f"{holder}.{name}" for name in names.split() if not hasattr(found, name)]
    return missing


class ShardedParameter:
    """A parameter in shards: where its values and its gradients stand.

    Args:
        inner: FSDP2's record of it.
        original: the parameter that the user made.

    Attributes:
        sharded: the DTensor that stands in the module between forwards, and in optimizers.
    """

    def __init__(self, inner: Any, original: nn.Parameter) -> None:
        self._inner, self.original = inner, original
        self.sharded: nn.Parameter = inner.sharded_param
        self._hooked: list[Any] = []
        self._reduced: list[Any] = []
        self._before_reduction: list[Any] = []

    @property
    def whole(self) -> nn.Parameter:
        """The leaf that autograd knows; it has values only while its group is gathered."""
        parameter: nn.Parameter = self._inner._unsharded_param
        return parameter

    def pass_on_hooks(self) -> None:
        """Let the user's hooks on the parameter see what autograd computes for the whole one."""
        if not self._hooked and (self.original._backward_hooks or self.sharded._backward_hooks):
            self._hooked.append(self.whole.register_hook(self._run_hooks))
        for hook in (getattr(self.original, "_post_accumulate_grad_hooks", None) or {}).values():
            if hook not in self._hooked:
                self._hooked += [self.whole.register_post_accumulate_grad_hook(hook), hook]

    def _run_hooks(self, gradient: Tensor) -> Tensor:
        for tensor in (self.original, self.sharded):
            for hook in list((tensor._backward_hooks or {}).values()):
                changed = hook(gradient)
                gradient = gradient if changed is None else changed
        return gradient

    @property
    def local_gradient(self) -> Tensor | None:
        """The gradient of this rank's losses since the last reduction."""
        found: Tensor | None = self._inner.unsharded_accumulated_grad
        return self.whole.grad if found is None else found

    @property
    def versions(self) -> list[Any]:
        """What changes when a backward adds to a gradient, or when somebody edits one; a reduction is neither."""
        gradients = [self.sharded.grad, self.whole.grad, self._inner.unsharded_accumulated_grad]
        now = [None if g is None else (id(g), local(g)._version) for g in gradients]
        return self._before_reduction if now == self._reduced else now

    def note_reduction(self, before: list[Any]) -> None:
        """Let `versions` go on being `before`: an optimizer that shared a reduction finds nothing edited."""
        self._reduced = []
        self._reduced, self._before_reduction = self.versions, before

    def part_versions(self) -> None:
        """Count edits of this gradient alone: FSDP2 cuts all of a layer out of one buffer, which counts for all."""
        gradient: Any = self.sharded.grad
        if gradient is not None and gradient._local_tensor._is_view():
            gradient._local_tensor = gradient._local_tensor.data

    def take_local_gradient(self) -> Callable[[], None]:
        """Drop the local gradient, and return what puts it back."""
        kept = self.whole.grad, self._inner.unsharded_accumulated_grad
        self.whole.grad = self._inner.unsharded_accumulated_grad = None

        def put_back() -> None:
            self.whole.grad, self._inner.unsharded_accumulated_grad = kept

        return put_back

    def zero_local_gradient(self) -> None:
        """Fill the local gradient with zeros, if there is one."""
        for gradient in (self.whole.grad, self._inner.unsharded_accumulated_grad):
            if gradient is not None:
                gradient.detach().zero_()

    def prepare_reduction(self) -> None:
        """Make a gradient of zeros where other ranks have one, and a dense one of a sparse one."""
        gradient = self.local_gradient
        if gradient is None:
            size, dtype = self.whole.size(), self.whole.dtype
            self.whole.grad = torch.zeros(size, dtype=dtype, device=self.whole.device)
        elif gradient.is_sparse:
            self.whole.grad = gradient.to_dense()

    def places(self) -> Iterable[tuple[nn.Module, str]]:
        """Return the modules that hold it, each with the name it has there."""
        info = self._inner._module_info
        yield info.module, info.param_name
        yield from zip(info.shared_modules, info.shared_param_names, strict=True)

    def note_step(self) -> None:
        """Let autograd see that the values changed, as it does with a parameter that is whole."""
        torch.autograd.graph.increment_version(self.whole)


class LayerGroup:
    """A module that `fully_shard` was applied to.

    Args:
        module: that one.
        name: of it in the user's module.
        originals: the parameters before, by module and name.
    """

    def __init__(self, module: Any, name: str, originals: dict[tuple[int, str], nn.Parameter]) -> None:
        self.module, self.name = module, name
        self._watch: Any = None
        self._inner = module._get_fsdp_state()._fsdp_param_group
        self.parameters: list[ShardedParameter] = []
        if self._inner is not None:
            infos = [(p, p._module_info) for p in self._inner.fsdp_params]
            self.parameters = [ShardedParameter(p, originals[id(i.module), i.param_name]) for p, i in infos]

    @property
    def gathered(self) -> bool:
        """Whether the whole parameters have values now."""
        return self._inner is not None and self._inner.is_unsharded

    def gather(self) -> None:
        """Gather the whole parameters; every rank of the mesh must call it."""
        self.module.unshard()

    def announce(self, say: Callable[[str], Any]) -> None:
        """Call `say` before each gather, so that ranks that do different things hear of it and do not wait.

        Args:
            say: is given in words what comes.
        """
        group = self._inner
        if group is None:
            return
        real = group.unshard

        def unshard(async_op: bool = False) -> None:
            if group._all_gather_result is None and not group.is_unsharded:
                say(f"gather {self.name}")
            real(async_op)

        group.unshard = unshard

    def release(self) -> None:
        """Free the whole parameters."""
        if self.gathered:
            self.module.reshard()

    def keep_local(self, free_in_backward: bool) -> None:
        """Let backwards leave gradients on the whole parameters.

        Args:
            free_in_backward: whether a backward frees the parameters behind it.
        """
        if self._inner is not None:
            self._inner.reduce_grads = False
            self._inner.reshard_after_backward = free_in_backward

    def refuse_graphs(self) -> None:
        """Let a backward that makes a graph of itself raise: the next one would find nothing to go through."""
        group = self._inner
        if group is None:
            return
        real = group.pre_backward

        def checked(*arguments: Any) -> Any:
            if torch.is_grad_enabled():
                raise ProtocolError(
                    explain(
                        "gradients that are not differentiated again, where each backward reduces and frees",
                        f"a gradient with create_graph=True through {self.name}",
                        "FSDP(reduce='finalize'), which is the default",
                    )
                )
            return real(*arguments)

        group.pre_backward = checked

    def unwatch(self) -> None:
        """Take `before_forward` back."""
        if self._watch is not None:
            self._watch.remove()

    def stay_gathered(self, stay: bool) -> None:
        """Say whether a forward leaves the parameters gathered."""
        self.module.set_reshard_after_forward(not stay, recurse=False)

    def before_forward(self, found_gathered: Callable[[LayerGroup], None]) -> None:
        """Call `found_gathered` before a forward of a group that is still gathered, outside of any pass."""
        group = self._inner
        if group is None:
            return

        def look(*_: Any) -> None:
            if group.is_unsharded and group._training_state.name == "IDLE":
                found_gathered(self)

        self._watch = self.module.register_forward_pre_hook(look, prepend=True)

    def follow_toggles(self) -> None:
        """Give whole parameters that stayed gathered the present ``requires_grad`` of their shards."""
        for parameter in self.parameters:
            if parameter.whole.requires_grad != parameter.sharded.requires_grad:
                parameter.whole.requires_grad_(parameter.sharded.requires_grad)

    def part_versions(self) -> None:
        """See `ShardedParameter.part_versions`; for all, after a reduction."""
        for parameter in self.parameters:
            parameter.part_versions()

    def start_reduction(self, wanted: Sequence[ShardedParameter]) -> Callable[[], None]:
        """Begin to reduce the gradients of `wanted`, some of `parameters`, which have one on every rank.

        Returns:
            What waits for the end.
        """
        before = [(parameter, parameter.versions) for parameter in wanted]
        for parameter in wanted:
            parameter.prepare_reduction()
        chosen = {id(parameter) for parameter in wanted}
        hidden = [p.take_local_gradient() for p in self.parameters if id(p) not in chosen]
        group = self._inner
        group.reduce_grads, group.reshard_after_backward = True, False
        group.post_backward()
        group.reduce_grads = False

        def finish() -> None:
            group.finalize_backward()
            for put_back in hidden:
                put_back()
            self.part_versions()
            for parameter, versions in before:
                parameter.note_reduction(versions)

        return finish


def reached(loss: Tensor, groups: Sequence[LayerGroup]) -> list[bool]:
    """Return which of `groups` a backward of `loss` comes through, also frozen ones, and then which parameters."""
    by_leaf: dict[Any, LayerGroup] = {p.whole: group for group in groups for p in group.parameters}
    by_inner = {id(group._inner): group for group in groups}
    found: set[Any] = set()
    seen: set[Any] = set()
    left: list[Any] = [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # where autograd adds into a parameter
        found |= {leaf, by_leaf.get(leaf)}
        found.add(by_inner.get(id(getattr(node, "param_group", None))))  # where FSDP2 ends a layer's backward
        left += [following for following, _ in node.next_functions]
    return [*(group in found for group in groups), *(p.whole in found for group in groups for p in group.parameters)]


def begin(network: nn.Module) -> None:
    """Make `network` a root, before a part of it is called alone, and while everything that trains says so."""
    state: Any = network
    state._get_fsdp_state()._lazy_init()


def detach(module: Any, before: tuple[type, set[str]]) -> None:
    """Take FSDP2 off `module` again; `before` is what `snapshot` returned."""
    state = module._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    group = state._fsdp_param_group
    for kind in ("save", "load"):
        for handle in getattr(group, f"_module_to_pre_{kind}_state_dict_hook_handle", {}).values():
            handle.remove()
    import_module("torch.distributed._composable_state")._module_state_mapping.pop(module, None)
    module.__class__ = before[0]
    for name in set(vars(module)) - before[1]:
        if name.startswith(("__composable", "_is_fsdp", "_fsdp")):
            delattr(module, name)


def snapshot(module: nn.Module) -> tuple[type, set[str]]:
    """Return what `detach` needs, before `fully_shard` is applied."""
    return type(module), set(vars(module))


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, and any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
