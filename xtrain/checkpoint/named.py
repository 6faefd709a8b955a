"""The state of optimizers by names of parameters, so that it can be read with any backend and any number of processes.

One optimizer is saved as a dict: its ``class``; its ``groups`` with their settings and the *names* of their
parameters as ``params``; its ``state`` by name, whole tensors; the ``dtypes`` of what it steps on, by name; under
``master`` the fp32 copies of parameters in a lower precision, if the backend steps on such; under ``outside`` the
values of parameters that belong to no module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from xtrain.errors import CheckpointError, explain
from xtrain.tensors import map_tensors, tensors_in

# How a step is computed belongs to the device, not to the state.
_IMPLEMENTATION = ("foreach", "fused", "capturable")
_PARTIAL = "trainer.fit(model, ckpt_path='...', load=('module', 'data')), which lists what it leaves out"
Saved = dict[str, Any]
Place = Callable[[Tensor, Tensor, str, Mapping[str, Any]], Tensor]


class Handle(Protocol):
    """What is needed of an optimizer of the run."""

    @property
    def optimizer(self) -> Optimizer:
        """The user's optimizer."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The module's parameters that it trains."""

    @property
    def step_count(self) -> int:
        """Steps that were applied."""

    @property
    def zeroed_at(self) -> int:
        """The `step_count` when its gradients were last zeroed."""


def keeps_gradients(handle: Handle) -> bool:
    """Return whether gradients that exist now may count in a later step.

    They do not if they were zeroed once before the last step and not since: the step after will zero them, too.
    """
    return handle.step_count - handle.zeroed_at != 1


def names_of_optimizers(optimizers: Iterable[Any]) -> list[str]:
    """Return the name of each optimizer: its own, or one by its position."""
    return [getattr(optimizer, "name", None) or f"optimizer{i}" for i, optimizer in enumerate(optimizers)]


def names_of_parameters(module: nn.Module, label: str, groups: Iterable[Mapping[str, Any]]) -> dict[Tensor, str]:
    """Return the names of the parameters in `groups`; those of no module are called by their place."""
    known: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    return {
        parameter: known.get(parameter, f"{label}.group{number}.{position}")
        for number, group in enumerate(groups)
        for position, parameter in enumerate(group["params"])
    }


def module_state(module: nn.Module) -> dict[str, Any]:
    """Return ``module.state_dict()`` with the tensor objects themselves, by which ties are seen."""
    return dict(module.state_dict(keep_vars=True))


def training_state(module: nn.Module, optimizers: Sequence[Handle]) -> dict[str, Any]:
    """Return what `xtrain.contract.Backend.training_state` describes, with tensors where they are."""
    named = dict(zip(names_of_optimizers(optimizers), optimizers, strict=True))
    states = {}
    for label, handle in named.items():
        names = names_of_parameters(module, label, handle.optimizer.param_groups)
        states[label] = optimizer_state(handle.optimizer, names, label)
    return {"state_dict": module_state(module), "optimizer_states": states}


def load_training_state(
    module: nn.Module, optimizers: Sequence[Handle], state: Mapping[str, Any], place: Place | None = None
) -> None:
    """Restore optimizers and gradients, see `xtrain.contract.Backend.load_training_state`."""
    for label, handle in zip(names_of_optimizers(optimizers), optimizers, strict=True):
        saved = state["optimizer_states"].get(label)
        if saved is not None:
            names = names_of_parameters(module, label, handle.optimizer.param_groups)
            load_optimizer_state(handle.optimizer, names, saved, label, place or torch_place)
    load_gradients(module, optimizers, state["gradients"])


def gradients(module: nn.Module, optimizers: Sequence[Handle]) -> dict[str, dict[str, Tensor]]:
    """Return this process's gradients that may count in a later step, by optimizer and parameter."""
    found: dict[str, dict[str, Tensor]] = {}
    known: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    for label, handle in zip(names_of_optimizers(optimizers), optimizers, strict=True):
        if keeps_gradients(handle):
            pairs = {known.get(p, f"{label}.{i}"): p.grad for i, p in enumerate(handle.parameters)}
            found[label] = {name: gradient for name, gradient in pairs.items() if gradient is not None}
    return {label: held for label, held in found.items() if held}


def load_gradients(module: nn.Module, optimizers: Sequence[Handle], saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Give parameters the gradients that `gradients` returned."""
    known: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    for label, handle in zip(names_of_optimizers(optimizers), optimizers, strict=True):
        for i, parameter in enumerate(handle.parameters):
            gradient = saved.get(label, {}).get(known.get(parameter, f"{label}.{i}"))
            if gradient is not None:
                parameter.grad = gradient.to(parameter.device, parameter.dtype, copy=True)


def copied(data: Any, to_cpu: Callable[[list[Tensor]], list[Tensor]]) -> Any:
    """Return `data` on the CPU; every tensor object is copied once, so that ties stay ties."""
    unique = {id(tensor): tensor for tensor in tensors_in(data)}
    copies = dict(zip(unique, to_cpu(list(unique.values())), strict=True))
    return map_tensors(lambda tensor: copies[id(tensor)], data)


def taken_state(
    module: nn.Module, optimizers: Sequence[Handle], first: bool, take: Callable[[list[Tensor]], list[Tensor]]
) -> dict[str, Any]:
    """Return what `xtrain.contract.Backend.training_state` describes, of a module that every rank has whole.

    Args:
        module: the user's.
        optimizers: those of the run.
        first: whether this is rank 0.
        take: returns what becomes of a list of tensors.
    """
    whole = training_state(module, optimizers) if first else {}
    return copied({**whole, "gradients": gradients(module, optimizers)}, take)  # type: ignore[no-any-return]


def taken(to_cpu: Callable[[list[Tensor]], list[Tensor]], live: bool, tensors: list[Tensor]) -> list[Tensor]:
    """Return `tensors` on the CPU.

    Args:
        to_cpu: copies a list of tensors.
        live: do not copy what lies there already, and fills its memory: a file has all of the memory of a tensor.
        tensors: anywhere.
    """
    stay = [live and t.is_cpu and _fills_its_memory(t) for t in tensors]
    copies = iter(to_cpu([t for t, stays in zip(tensors, stay, strict=True) if not stays]))
    return [t.detach() if stays else next(copies) for t, stays in zip(tensors, stay, strict=True)]


def _fills_its_memory(tensor: Tensor) -> bool:
    strided = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return strided and tensor.untyped_storage().nbytes() == tensor.nbytes


# -------------------------------------------------------------------- one optimizer


def optimizer_state(raw: Optimizer, names: Mapping[Tensor, str], label: str) -> Saved:
    """Return the state of `raw`, its tensors where they are.

    Args:
        raw: a torch optimizer.
        names: of its parameters.
        label: its name.
    """
    packed = raw.state_dict()
    order = [names[p] for group in raw.param_groups for p in group["params"]]
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        | {"params": [order[i] for i in group["params"]]}
        for group in packed["param_groups"]
    ]
    state = {order[key] if isinstance(key, int) else key: value for key, value in packed["state"].items()}
    return {
        "class": type(raw).__name__,
        "groups": groups,
        "state": state,
        "dtypes": {name: parameter.dtype for parameter, name in names.items()},
        "master": {},
        "outside": {name: p for p, name in names.items() if name.startswith(f"{label}.group")},
    }


def torch_place(value: Tensor, parameter: Tensor, key: str, group: Mapping[str, Any]) -> Tensor:
    """Return a copy of `value`, an entry of the state of `parameter`, where torch's optimizers want it."""
    on_device = key != "step" or group.get("capturable") or group.get("fused")
    return value.to(parameter.device if on_device else "cpu", copy=True)


def load_optimizer_state(
    raw: Optimizer, names: Mapping[Tensor, str], saved: Saved, label: str, place: Place = torch_place
) -> None:
    """Restore `raw` from what `optimizer_state` returned, in place: groups and parameters stay the objects they are.

    Args:
        raw: a torch optimizer over the same parameters in the same groups.
        names: of its parameters.
        saved: CPU tensors by name.
        label: the optimizer's name, for messages.
        place: puts one tensor of the state where it belongs.

    Raises:
        CheckpointError: if the groups are others; the message has the first difference.
    """
    check_groups(label, type(raw).__name__, [[names[p] for p in g["params"]] for g in raw.param_groups], saved)
    for group, old in zip(raw.param_groups, saved["groups"], strict=True):
        load_settings(group, old)
    by_name = {name: parameter for parameter, name in names.items()}
    with torch.no_grad():
        for name, value in saved["outside"].items():
            by_name[name].copy_(value)
    if type(raw).load_state_dict is not Optimizer.load_state_dict:  # it knows more about its state than we do
        _load_its_own_way(raw, names, saved)
        return
    own = {p: group for group in raw.param_groups for p in group["params"]}
    raw.state.clear()
    for name, entries in saved["state"].items():
        parameter: Any = by_name.get(name, name)
        group = own.get(parameter, {})
        put = partial(_put, place, parameter, group, saved["dtypes"].get(name))
        raw.state[parameter] = {key: map_tensors(partial(put, key), value) for key, value in entries.items()}


def _put(
    place: Place, parameter: Tensor, group: Mapping[str, Any], dtype: torch.dtype | None, key: str, value: Tensor
) -> Tensor:
    """Place one tensor; what was in the dtype of its parameter gets the dtype the parameter has now."""
    if value.dtype is dtype and value.is_floating_point() and key != "step":
        value = value.to(parameter.dtype)
    return place(value, parameter, key, group)


def load_settings(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Give a group of parameters the saved settings: learning rate, betas, and what schedulers keep there."""
    for key, value in saved.items():
        if key == "params" or key in _IMPLEMENTATION:
            continue
        present = group.get(key)
        if isinstance(present, Tensor):
            with torch.no_grad():
                present.copy_(torch.as_tensor(value))
        elif isinstance(value, Tensor) and value.numel() == 1:
            group[key] = value.item()
        else:
            group[key] = value


def _load_its_own_way(raw: Optimizer, names: Mapping[Tensor, str], saved: Saved) -> None:
    numbers = {names[p]: i for i, p in enumerate(p for group in raw.param_groups for p in group["params"])}
    state = {numbers.get(name, name): entries for name, entries in saved["state"].items()}
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        | {"params": [numbers[names[p]] for p in group["params"]]}
        for group in raw.param_groups
    ]
    raw.load_state_dict({"state": state, "param_groups": groups})


def check_groups(label: str, kind: str, groups: Sequence[Sequence[str]], saved: Saved) -> None:
    """Check that an optimizer has the groups of a saved one.

    Args:
        label: its name.
        kind: its class.
        groups: names of the parameters, by group.
        saved: the state.

    Raises:
        CheckpointError: with the first difference.
    """
    ours: list[tuple[str, object]] = [("class", kind), ("number of groups", len(groups))]
    theirs: list[tuple[str, object]] = [("class", saved["class"]), ("number of groups", len(saved["groups"]))]
    for number, (names, old) in enumerate(zip(groups, saved["groups"], strict=False)):
        pairs = zip([*names, "nothing more"], [*old["params"], "nothing more"], strict=False)
        mine, its = next(((a, b) for a, b in pairs if a != b), ("", ""))
        ours.append((f"group {number}", mine))
        theirs.append((f"group {number}", its))
    for (what, here), (_, there) in zip(ours, theirs, strict=True):
        if here != there:
            expected = f"optimizer {label!r} as it was saved: {what} {there!r}"
            raise CheckpointError(explain(expected, f"{what} {here!r}", _PARTIAL))
