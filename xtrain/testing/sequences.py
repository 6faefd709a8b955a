"""Random sequences of the verbs, and a small model of which of them are legal.

A program is a list of training steps, each a list of verbs over one to three optimizers. `plans` draws
it verb by verb, with the state of every optimizer and so with what is allowed next. Legal programs must
leave the parameters of the same program run in plain PyTorch; an illegal verb must raise
`ProtocolError`, and must be the one that raises.
"""

# ruff: noqa: D102 - hooks are documented where `xtrain.hooks` declares them
from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from xtrain.testing.networks import Batch, Mlp, adam, networks, sgd
from xtrain.testing.oracle import Plain
from xtrain.testing.recorder import Recorder

JOINT = 3
"""The loss that reaches all networks; losses 0 to 2 reach one each."""

LIMIT = 0.05

_WEIGHTS = {"step": 4, "clip": 2, "zero": 1, "zero_in_place": 1, "toggle": 1, "schedule": 1}
_PHASE_AFTER = {"zero": "empty", "zero_in_place": "empty", "clip": "final", "step": "used"}
_NEEDS_GRADIENTS = ("clip", "step")  # without any they do nothing


@dataclass(frozen=True)
class Verb:
    """One call: its name and the optimizer, or for ``backward`` the loss, it is about."""

    name: str
    index: int = 0

    def __repr__(self) -> str:
        return f"{self.name}({self.index})"


Program = list[list[Verb]]


@dataclass(frozen=True)
class Plan:
    """A program, and whether it is legal.

    Attributes:
        count: number of optimizers.
        program: the verbs by training step.
        illegal: whether the very last verb must raise `ProtocolError`.
    """

    count: int
    program: Program
    illegal: bool


@dataclass
class _State:
    """What the model knows of the run so far: where gradients are, whether there are any, open toggles.

    A backward may add to clipped gradients where they are `editable`.
    """

    count: int
    editable: bool = True
    phase: list[str] = field(default_factory=list)
    filled: list[bool] = field(default_factory=list)
    toggles: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.phase, self.filled = ["empty"] * self.count, [False] * self.count

    def reaches(self, loss: int) -> list[int]:
        """Return the networks that a backward of `loss` adds gradients to."""
        touched = range(self.count) if loss == JOINT else [loss]
        return [i for i in touched if not self.toggles or self.toggles[-1] == i]

    def verbs(self, legal: bool) -> list[Verb]:
        """Return the legal or the illegal verbs, as often as they should be drawn."""
        every = [Verb(name, i) for name, times in _WEIGHTS.items() for i in range(self.count) for _ in range(times)]
        every += [Verb("backward", loss) for loss in (*range(self.count), JOINT) if self.reaches(loss)] * 2
        every += [Verb("untoggle")] * 3 if self.toggles else []
        return [verb for verb in every if self.legal(verb) is legal]

    def legal(self, verb: Verb) -> bool:
        """Return whether `verb` is allowed by the life of a gradient."""
        if verb.name == "backward":
            return self.editable or all(self.phase[i] != "final" for i in self.reaches(verb.index))
        return verb.name != "clip" or self.phase[verb.index] != "used"

    def apply(self, verb: Verb) -> None:
        """Advance by a legal `verb`."""
        i = verb.index
        if verb.name == "backward":
            for reached in self.reaches(i):
                self.filled[reached], self.phase[reached] = True, "held"
            # A backward concerns every optimizer that is not toggled off: its earlier gradients may be used again.
            for other in range(self.count) if not self.toggles else self.toggles[-1:]:
                if self.phase[other] != "final":
                    self.phase[other] = "held"
        elif verb.name in _NEEDS_GRADIENTS and not self.filled[i]:
            self.phase[i] = "empty"
        elif verb.name in _PHASE_AFTER:
            self.phase[i] = _PHASE_AFTER[verb.name]
            self.filled[i] &= verb.name != "zero"  # zeros are still gradients, once a backward adds to them
        elif verb.name == "toggle":
            self.toggles.append(i)
        elif verb.name == "untoggle":
            self.toggles.pop()


@st.composite
def plans(draw: st.DrawFn, illegal: bool, editable: bool) -> Plan:
    """Return a strategy for legal programs, or for ones whose last verb alone is illegal.

    Args:
        draw: given by hypothesis.
        illegal: whether to end with an illegal verb.
        editable: the capability ``editable_gradients`` of the backend.
    """
    state = _State(draw(st.integers(1, 3)), editable)
    program: Program = []
    for _ in range(draw(st.integers(1, 4))):
        program.append([])
        for _ in range(draw(st.integers(3, 9))):
            _append(draw(st.sampled_from(state.verbs(legal=True))), state, program)
    if illegal:
        if not state.verbs(legal=False):
            _append(Verb("backward", JOINT), state, program)
            _append(Verb("step", state.toggles[-1] if state.toggles else 0), state, program)
        program[-1].append(draw(st.sampled_from(state.verbs(legal=False))))
    return Plan(state.count, program, illegal)


def _append(verb: Verb, state: _State, program: Program) -> None:
    state.apply(verb)
    program[-1].append(verb)


# -------------------------------------------------------------------- both sides


def _networks(generator: Mlp, discriminator: Mlp) -> list[Mlp]:
    return [generator, discriminator, networks(seed=8)[1]]


def _loss(nets: list[Mlp], batch: Batch, which: int, count: int) -> Tensor:
    """Return loss `which` (0-dim), a mean over rows; network 0 is fed latents, the others samples."""
    x, z = batch
    outputs = [nets[i](x if i else z).mean(1) for i in (range(count) if which == JOINT else [which])]
    return (torch.stack(outputs).sum(0) - 1.0).square().mean()


def _optimizers(nets: list[Mlp], count: int) -> tuple[list[Optimizer], list[ExponentialLR]]:
    optimizers: list[Optimizer] = [make(net.parameters()) for make, net in zip((sgd, adam, sgd), nets, strict=True)]
    return optimizers[:count], [ExponentialLR(opt, 0.8) for opt in optimizers[:count]]


class SequenceModule(Recorder):
    """Runs a plan with the verbs of xtrain; `position` counts the calls so far."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.nets = _networks(self.G, self.D)
        self.third = self.nets[2]
        self.position = 0
        self.toggles: list[int] = []

    def configure_optimizers(self) -> Any:
        return _optimizers(self.nets, self.plan.count)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizers, schedulers = _as_list(self.optimizers()), _as_list(self.lr_schedulers())
        for verb in self.plan.program[batch_idx]:
            self.position += 1
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Expected gradients of optimizer")  # of a step on nothing
                self._call(verb, batch, optimizers, schedulers)
            if verb.name in ("toggle", "untoggle"):
                self.note(requires_grad=[net.first.weight.requires_grad for net in self.nets])

    def _call(self, verb: Verb, batch: Batch, optimizers: list[Any], schedulers: list[Any]) -> None:
        if verb.name == "backward":
            self.manual_backward(_loss(self.nets, batch, verb.index, self.plan.count))
        elif verb.name in ("zero", "zero_in_place"):
            optimizers[verb.index].zero_grad(set_to_none=verb.name == "zero")
        elif verb.name == "clip":
            self.note(norm=self.clip_gradients(optimizers[verb.index], LIMIT))
        elif verb.name == "step":
            optimizers[verb.index].step()
        elif verb.name == "schedule":
            schedulers[verb.index].step()
        elif verb.name == "toggle":
            self.toggles.append(verb.index)
            self.toggle_optimizer(optimizers[verb.index])
        else:
            self.untoggle_optimizer(optimizers[self.toggles.pop()])


def _as_list(items: Any) -> list[Any]:
    return items if isinstance(items, list) else [items]


def run_by_hand(run: Plain, plan: Plan) -> None:
    """Run a legal plan in plain PyTorch; parameters of all three networks are left in `run`."""
    nets = _networks(run.G, run.D)
    run.third = nets[2].to(run.device, run.dtype)
    optimizers, schedulers = _optimizers(nets, plan.count)
    run.count_steps_of(*optimizers)
    toggles: list[int] = []
    for _, index, batch in run.steps():
        for verb in plan.program[index]:
            if verb.name == "backward":
                with run.forward_context():
                    loss = _loss(nets, batch, verb.index, plan.count)
                run.backward(loss)
            elif verb.name in ("zero", "zero_in_place"):
                optimizers[verb.index].zero_grad(set_to_none=verb.name == "zero")
            elif verb.name == "clip":
                run.note(norm=clip_grad_norm_(nets[verb.index].parameters(), LIMIT))
            elif verb.name == "step" and all(p.grad is None for p in nets[verb.index].parameters()):
                run.idle_steps += 1
            elif verb.name == "step":
                optimizers[verb.index].step()
            elif verb.name == "schedule":
                schedulers[verb.index].step()
            else:
                toggles = [*toggles, verb.index] if verb.name == "toggle" else toggles[:-1]
                for i, net in enumerate(nets[: plan.count]):
                    net.requires_grad_(not toggles or toggles[-1] == i)
                run.note(requires_grad=[net.first.weight.requires_grad for net in nets])
