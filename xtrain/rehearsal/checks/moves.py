"""How the parameters of a training move, step by step, and whether two trainings differ by more than rounding."""

from __future__ import annotations

import hashlib
import math
import pickle
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from xtrain.callbacks.base import Callback
from xtrain.rehearsal.checks.calls import Call, Calls
from xtrain.rehearsal.checks.draws import Draw, Draws

NOBODYS = "no optimizer"
_FEW, _FEW_OF_MANY = 2, 0.01  # numbers, and the share of them, that may differ by anything in 16 bits
_MOST = 2**21  # numbers that are kept of a training; of larger ones a sample


@dataclass
class Record:
    """A training.

    Attributes:
        parameters: before the first step and after each one, by name, of large modules a sample.
        shapes: of the parameters; empty shapes where they are a sample.
        owners: the optimizer of each parameter.
        order: the optimizers in the order of their first steps.
        rates: the learning rates after each step.
        generators: a digest of the states of Python's and NumPy's after each step.
        draws: the random numbers of its steps.
        calls: what the user's lines computed.
        parted: in which step it began to draw other numbers than its source, and the reason.
        skipped: whether a step was not applied, because of an overflow.
        moved: buffers that the steps changed, batch statistics aside.
        statistics: layers that normalise by the batch of their process.
    """

    parameters: list[dict[str, Tensor]] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)
    generators: list[str] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    parted: tuple[int, str] | None = None
    skipped: bool = False
    moved: list[str] = field(default_factory=list)
    statistics: list[str] = field(default_factory=list)

    def moves(self, step: int, name: str) -> Tensor:
        """Return how far the parameter has moved since the beginning."""
        return self.parameters[step][name].double() - self.parameters[0][name].double()


@dataclass
class Likeness:
    """What counts as rounding.

    Attributes:
        share: of a movement that may differ.
        unit: the relative error of a number that was computed.
        together: whether the parameters of an optimizer are one movement, of which the numbers that differ most are
            left out: in 16 bits single gradients near zero have the other sign, which Adam makes a whole step of.
        place: the value of the last place of a parameter that is 1, as it is kept.
        factor: how many times what the moved references differ by.
        references: trainings whose parameters were moved by rounding in the beginning.
    """

    share: float = 0.0
    place: float = 0.0
    factor: float = 0.0
    unit: float = 0.0
    together: bool = False
    references: Sequence[Record] = ()

    def tolerance(self, whole: Record, step: int, names: Sequence[str]) -> float:
        """Return the largest 2-norm of a difference of the parameters `names` that is rounding."""
        spread = max((apart(whole, r, step, names, self.together) for r in self.references), default=0.0)
        stored = self.place * step * math.hypot(*(float(whole.parameters[step][n].norm()) for n in names))
        return self.factor * spread + self.share * moved(whole, step, names) + stored + 1e-12


class Difference(NamedTuple):
    """Where two trainings differ: the step, the optimizer, the parameter, and a number in both as text."""

    step: int
    optimizer: str
    parameter: str
    text: str


class Watch(Callback):
    """Makes the `Record` of a training, inside of `draws` (and of `calls`, if its lines are wanted).

    Args:
        draws: see `Draws`.
        calls: see `Calls`; None notes no lines.
        moved_by: relative, by which parameters are moved before the first step.
        seed: of that.
    """

    def __init__(self, draws: Draws, calls: Calls | None = None, moved_by: float = 0.0, seed: int = 0) -> None:
        self.record, self._draws, self._calls = Record(), draws, calls
        self._moved_by, self._seed, self._step, self._every = moved_by, seed, 0, 1
        self._buffers: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Keep the parameters as they are, and watch the optimizers."""
        if self._moved_by:
            _move(module.parameters(), self._moved_by, self._seed)
        total = sum(trainer.backend.elements_of(p) for p in module.parameters())
        self._every = max(1, math.ceil(total / _MOST))
        names = {id(p): name for name, p in module.named_parameters()}
        for wrapped in trainer.life.optimizers:
            label = repr(wrapped)
            for parameter in wrapped.parameters:
                if id(parameter) in names:
                    self.record.owners.setdefault(names[id(parameter)], label)
            wrapped.optimizer.register_step_post_hook(lambda *_, label=label: self._stepped(label))
        self._buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
        self.record.statistics = [n for n, layer in module.named_modules() if _by_batch(layer)]
        self._keep(trainer, module)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Begin a step."""
        self._step += 1
        self._draws.inside = True
        if self._calls is not None:
            self._calls.step = self._step

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End a step, and keep the parameters."""
        record, self._draws.inside = self.record, False
        if self._calls is not None:
            self._calls.step = 0
        if self._draws.parted and record.parted is None:
            record.parted = self._step, self._draws.parted
        self._keep(trainer, module)
        record.rates.append([float(g["lr"]) for o in trainer.optimizers for g in o.param_groups if "lr" in g])
        record.generators.append(_generators())
        record.skipped = any(o.skipped_steps for o in trainer.life.optimizers)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Note what the steps have changed besides."""
        statistics = tuple(f"{n}." for n, layer in module.named_modules() if isinstance(layer, _BatchNorm))
        now = {n: b for n, b in module.named_buffers() if n in self._buffers and not n.startswith(statistics)}
        self.record.moved = [n for n, b in now.items() if not _same(b, self._buffers[n])]
        self.record.draws = self._draws.seen
        self.record.calls = [] if self._calls is None else self._calls.seen

    def _stepped(self, label: str) -> None:
        if label not in self.record.order:
            self.record.order.append(label)

    def _keep(self, trainer: Any, module: nn.Module) -> None:
        with trainer.backend.full_parameters(module):
            named = {n: p.detach() for n, p in module.named_parameters() if p.is_floating_point()}
            kept = dict(zip(named, trainer.backend.to_cpu(list(named.values())), strict=True))
        self.record.shapes = {n: tuple(p.shape) if self._every == 1 else () for n, p in kept.items()}
        self.record.parameters.append({n: p.flatten()[:: self._every].float() for n, p in kept.items()})


def _by_batch(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and layer.training and not isinstance(layer, nn.SyncBatchNorm)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


@torch.no_grad()
def _move(parameters: Iterable[Tensor], share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1.0 + share * noise.to(parameter.dtype))


def _generators() -> str:
    numpy = sys.modules.get("numpy")
    states = [random.getstate(), None if numpy is None else numpy.random.get_state()]
    return hashlib.blake2b(pickle.dumps(states)).hexdigest()


# ---------------------------------------------------------------- comparison


def first_difference(whole: Record, other: Record, likeness: Likeness) -> Difference | None:
    """Return where `other` differs from `whole` by more than rounding: the first step, its first optimizer.

    Of the parameters of that optimizer it is the one that differs most.
    """
    for step in range(1, comparable(whole, other) + 1):
        for optimizer, groups in _grouped(whole, likeness.together).items():
            if any(_excess(whole, other, step, names, likeness) > 1 for names in groups):
                every = [name for names in groups for name in names]
                name = max(every, key=lambda n: _excess(whole, other, step, [n], likeness))
                return Difference(step, optimizer, name, _numbers(whole, other, step, name))
    return None


def _grouped(whole: Record, together: bool) -> dict[str, list[list[str]]]:
    """Return the names that are compared as one, by optimizer, in the order of the optimizers' first steps."""
    by_owner: dict[str, list[str]] = {optimizer: [] for optimizer in [*whole.order, NOBODYS]}
    for name in whole.parameters[0]:
        by_owner[_owner(whole, name)].append(name)
    return {o: [names] if together else [[n] for n in names] for o, names in by_owner.items() if names}


def apart(whole: Record, other: Record, step: int, names: Sequence[str], trimmed: bool = False) -> float:
    """Return the 2-norm of the difference between two movements; `trimmed` leaves out what differs most."""
    away = torch.cat([(other.moves(step, name) - whole.moves(step, name)).abs() for name in names])
    if trimmed and bool(away.isfinite().all()):
        few = min(len(away) // 2, max(_FEW, int(_FEW_OF_MANY * len(away))))
        away = away.topk(len(away) - few, largest=False).values
    return float(away.norm())


def moved(whole: Record, step: int, names: Sequence[str]) -> float:
    """Return the 2-norm of a movement."""
    return math.hypot(*(float(whole.moves(step, n).norm()) for n in names))


def comparable(whole: Record, other: Record) -> int:
    """Return how many steps of both had the same random numbers."""
    steps = min(len(whole.parameters), len(other.parameters)) - 1
    if other.parted is not None:
        steps = min(steps, other.parted[0] - 1)
    pairs = zip(whole.generators, other.generators, strict=False)
    return min(steps, next((i for i, (one, two) in enumerate(pairs) if one != two), steps))


def distance(whole: Record, other: Record) -> float:
    """Return by which share of their movement the parameters of an optimizer differ after the last comparable step."""
    step = comparable(whole, other)
    groups = [names for found in _grouped(whole, together=True).values() for names in found]
    shares = [apart(whole, other, step, names) / max(moved(whole, step, names), 1e-30) for names in groups]
    return max(shares, default=0.0) if step else 0.0


def judged(whole: Record, likeness: Likeness) -> bool:
    """Return whether any parameter moves by more than rounding makes of it: else nothing can be told."""
    steps = range(1, len(whole.parameters))
    groups = [names for found in _grouped(whole, likeness.together).values() for names in found]
    return any(likeness.tolerance(whole, step, names) < moved(whole, step, names) for step in steps for names in groups)


def finite(record: Record) -> bool:
    """Return whether every parameter is a number after every step."""
    return all(bool(values.isfinite().all()) for kept in record.parameters for values in kept.values())


def _owner(whole: Record, name: str) -> str:
    owner = whole.owners.get(name, NOBODYS)
    return owner if owner in whole.order else NOBODYS


def _excess(whole: Record, other: Record, step: int, names: Sequence[str], likeness: Likeness) -> float:
    difference = apart(whole, other, step, names, likeness.together)
    return difference / likeness.tolerance(whole, step, names) if math.isfinite(difference) else math.inf


def _numbers(whole: Record, other: Record, step: int, name: str) -> str:
    """Return the number that differs most, in both."""
    one, two = whole.parameters[step][name], other.parameters[step][name]
    away = (two - one).abs()
    position = int(torch.where(away.isfinite(), away, torch.full_like(away, math.inf)).argmax())
    place = ", ".join(map(str, _index(position, whole.shapes[name])))
    shown = f"{name}[{place}]" if place else name
    return f"{shown} is {float(two[position]):.6g} and not {float(one[position]):.6g}"


def _index(position: int, shape: tuple[int, ...]) -> Iterator[int]:
    for axis in range(len(shape)):
        rest = math.prod(shape[axis + 1 :])
        yield position // rest
        position %= rest
