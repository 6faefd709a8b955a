"""What a module and its optimizers take on a device, by arithmetic: before anything was trained."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

_SIZES = (2, 3, 5, 7, 11)  # of a small tensor: each names one dimension of the large one


class Trained(Protocol):
    """An optimizer of the run, as far as it matters here; see `xtrain.contract.OptimizerHandle`."""

    @property
    def optimizer(self) -> Optimizer:
        """Of torch."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """What it trains."""


@dataclass(frozen=True)
class Memory:
    """Bytes that one process holds in a training step, activations aside.

    Attributes:
        parameters: in the precision of the run; of shards, if they are.
        gradients: between the last backward and the step.
        state: of the optimizers, after their first step.
        masters: copies of the parameters with more digits, which some backends step.
        unknown: classes of optimizers whose state nobody can tell before their first step.
    """

    parameters: int = 0
    gradients: int = 0
    state: int = 0
    masters: int = 0
    unknown: tuple[str, ...] = ()


def memory_of(
    module: nn.Module,
    optimizers: Iterable[Trained],
    held: Callable[[Tensor], int],
    gradient: Callable[[Tensor], int] | None = None,
    masters: Callable[[Trained], Sequence[Tensor] | None] = lambda optimizer: None,
) -> Memory:
    """Return what `module` and `optimizers` take.

    Args:
        module: as a backend has set it up.
        optimizers: those of the run.
        held: says how many numbers of a parameter this process holds.
        gradient: says how many numbers of its gradient; default: as many.
        masters: gives the copies of parameters that an optimizer steps on this device; None: the parameters themselves.
    """
    parameters = [p for p in module.parameters() if not is_lazy(p)]
    counted = gradient or held
    state = copies = 0
    unknown = []
    for handle in optimizers:
        stepped = masters(handle)
        copies += sum(p.numel() * p.element_size() for p in stepped or ())
        own = (handle.parameters, held) if stepped is None else (stepped, Tensor.numel)
        found = state_of(handle.optimizer, *own)
        state += found or 0
        unknown += [] if found is not None else [type(handle.optimizer).__name__]
    return Memory(
        parameters=sum(held(p) * p.element_size() for p in parameters),
        gradients=sum(counted(p) * p.element_size() for p in parameters if p.requires_grad),
        state=state,
        masters=copies,
        unknown=tuple(unknown),
    )


def state_of(
    optimizer: Optimizer, tensors: Iterable[Tensor], held: Callable[[Tensor], int] = Tensor.numel
) -> int | None:
    """Return the bytes of state that `optimizer` will have for `tensors`, None if that cannot be told.

    A copy of it steps small tensors whose dimensions are distinct primes, so that the shape of each state tells which
    dimensions of the parameter it has. Optimizers of torch alone are asked: the step of another might communicate.

    Args:
        optimizer: of torch.
        tensors: what it will step.
        held: says how many numbers of each this process holds.
    """
    if not type(optimizer).__module__.startswith("torch.optim"):
        return None
    trained = [p for p in tensors if p.requires_grad and not is_lazy(p)]
    if trained and all(optimizer.state.get(p) for p in trained):  # Adagrad of torch 2.9 makes it at once
        return round(sum(_bytes(_sizes_of(optimizer.state[p]), held(p) / (p.numel() or 1)) for p in trained))
    total = 0.0
    kinds = Counter((p.shape, p.dtype, held(p)) for p in trained)
    for (shape, dtype, own), count in kinds.items():
        made = _made_by(optimizer, shape, dtype)
        if made is None:
            return None
        total += count * _bytes(made, own / (math.prod(shape) or 1))
    return round(total)


def _bytes(made: Iterable[tuple[int, int]], share: float) -> float:
    return sum(n * size * (share if n > 1 else 1) for n, size in made)


def _sizes_of(state: Mapping[str, Any]) -> list[tuple[int, int]]:
    return [(value.numel(), value.element_size()) for value in state.values() if isinstance(value, Tensor)]


def _made_by(optimizer: Optimizer, shape: Sequence[int], dtype: torch.dtype) -> list[tuple[int, int]] | None:
    """Return the state for a parameter of `shape`: of each tensor how many numbers, and the bytes of one."""
    if len(shape) > len(_SIZES):
        return None
    sizes = [prime if size > 1 else size for prime, size in zip(_SIZES, shape, strict=False)]
    small = nn.Parameter(torch.zeros(sizes, dtype=dtype))
    small.grad = torch.zeros_like(small)
    probe = object.__new__(type(optimizer))
    own = {name: value for name, value in vars(optimizer).items() if name not in ("step", "zero_grad")}
    vars(probe).update(own, _optimizer_step_pre_hooks=OrderedDict(), _optimizer_step_post_hooks=OrderedDict())
    group = optimizer.param_groups[0]
    plain: dict[str, Any] = {name: False for name in ("fused", "foreach", "capturable") if name in group}
    probe.state, probe.param_groups = defaultdict(dict), [{**group, **plain, "params": [small]}]
    try:
        with torch.random.fork_rng(devices=[]):
            probe.step()
    except Exception:  # a step that needs a closure, or refuses the shape
        return None
    back = dict(zip(sizes, shape, strict=True))
    kept = [value for value in _values(probe.state) if isinstance(value, Tensor)]
    return [(math.prod(back.get(size, size) for size in value.shape), value.element_size()) for value in kept]


def _values(state: Mapping[Any, Mapping[str, Any]]) -> Iterable[Any]:
    return (value for entries in state.values() for value in entries.values())
