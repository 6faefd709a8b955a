"""What exists before a step: tensors by name, counters of optimizers; and which of it a step has changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xtrain.compiled.optimizers import Rates
from xtrain.contract import Phase
from xtrain.run.state import Run


@dataclass(frozen=True)
class Slot:
    """Stands for an output of the operations."""

    number: int


@dataclass
class Outputs:
    """The tensors that a step results in; each is an output once."""

    tensors: list[Tensor] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)

    def slot(self, tensor: Tensor) -> Slot:
        """Return what stands for `tensor`, which becomes an output."""
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        return Slot(self._numbers[id(tensor)])


class Known:
    """The tensors that exist before a step, and what they are."""

    def __init__(self, run: Run, batch: Sequence[Tensor], rates: Rates) -> None:
        self._run = run
        self.names: dict[int, str] = {}
        self._sources: dict[int, tuple[str, Any]] = {}
        self._lasting = self._lasting_tensors()
        for name, tensor in self._lasting.items():
            self._add(name, tensor, "fixed", tensor)
        for index, tensor in enumerate(rates.tensors):
            self._add(f"learning rate {index}", tensor, "fixed", tensor)
        self._before = {id(p): p.grad for p in self._parameters()}
        for index, parameter in enumerate(self._parameters()):
            if parameter.grad is not None:
                self._add(f"gradient {index}", parameter.grad, "gradient", parameter)
        for index, (optimizer, flags) in enumerate(flags_of(run)):
            for place, flag in enumerate(flags):
                self._add(f"overflow {place} of optimizer {index}", flag, "overflow", (optimizer, place))
        for index, tensor in enumerate(batch):
            self._add(f"batch {index}", tensor, "batch", index)

    def _add(self, name: str, tensor: Tensor, kind: str, source: Any) -> None:
        self.names[id(tensor)] = name
        self._sources[id(tensor)] = (kind, source)

    def _parameters(self) -> list[Tensor]:
        owned = [p for o in self._run.life.optimizers for p in o.parameters]
        return list(dict.fromkeys([*self._run.module.parameters(), *owned]))

    def _lasting_tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {f"parameter {n}": t for n, t in self._run.module.named_parameters()}
        found |= {f"buffer {n}": t for n, t in self._run.module.named_buffers()}
        for index, optimizer in enumerate(self._run.life.optimizers):
            raw = optimizer.optimizer
            held = [p for group in raw.param_groups for p in group["params"]]
            found |= {f"parameter {position} of optimizer {index}": p for position, p in enumerate(held)
                      if not any(p is t for t in found.values())}  # fmt: skip
            for position, parameter in enumerate(held):
                for key, value in raw.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        found[f"{key} {position} of optimizer {index}"] = value
        return found

    def source(self, tensor: Tensor) -> tuple[str, Any]:
        """Return how `tensor` is found again; one that nobody knows stays what it is."""
        return self._sources.get(id(tensor), ("fixed", tensor))

    def new_gradients(self, outputs: Outputs) -> list[tuple[Tensor, int | None]]:
        """Return the parameters whose gradient is another tensor than before the step, with its output."""
        found: list[tuple[Tensor, int | None]] = []
        for parameter in self._parameters():
            gradient = parameter.grad
            if gradient is not self._before[id(parameter)]:
                found.append((parameter, None if gradient is None else outputs.slot(gradient).number))
        return found

    def changed(self) -> bool:
        """Return whether parameters, buffers or states of optimizers are other tensors than before the step."""
        after = self._lasting_tensors()
        return after.keys() != self._lasting.keys() or any(after[n] is not t for n, t in self._lasting.items())


_NOT_NOW = -3  # where `zeroed_at` never is


class Counters:
    """What a step changes in the wrapped optimizers and in the run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._global_step = run.trainer.progress.global_step
        self._before = [(o, o.step_count, o.zeroed_at) for o in run.life.optimizers]
        for optimizer in run.life.optimizers:
            optimizer.zeroed_at = _NOT_NOW

    def changes(self) -> list[tuple[Any, dict[str, Any]]]:
        """Return the changes: of each optimizer, and last those of the run."""
        run, found = self._run, []
        for optimizer, steps, zeroed_at in self._before:
            zeroed = None if optimizer.zeroed_at == _NOT_NOW else optimizer.zeroed_at - steps
            optimizer.zeroed_at = zeroed_at if zeroed is None else optimizer.zeroed_at
            after = {
                "phase": optimizer.phase,
                "steps": optimizer.step_count - steps,
                "zeroed": zeroed,
                "zeros": optimizer._zeros is not None,
            }
            found.append((optimizer, after))
        steps = int(run.trainer.progress.global_step) - self._global_step
        found.append((run, {"stepped": run.life.stepped, "window": run.window, "global_step": steps}))
        return found


def apply_counters(counters: list[tuple[Any, dict[str, Any]]]) -> None:
    """Make the changes of a recorded step again."""
    for optimizer, after in counters[:-1]:
        before = optimizer.step_count
        optimizer.phase, optimizer.applied = after["phase"], optimizer.applied or after["steps"] > 0
        optimizer.step_count = before + after["steps"]
        if after["zeroed"] is not None:
            optimizer.zeroed_at = before + after["zeroed"]
        if not after["zeros"]:
            optimizer._zeros = None
        elif after["phase"] is Phase.EMPTY:
            optimizer._zeros = optimizer._backend.gradient_versions(optimizer)
        else:
            optimizer._zeros = []
    run, after = counters[-1]
    run.life.stepped, run.window = run.life.stepped or after["stepped"], after["window"]
    run.trainer.progress.global_step += after["global_step"]


def flags_of(run: Run) -> list[tuple[Any, list[Tensor]]]:
    """Return the optimizers whose gradients carry no loss scale now, with what says whether they overflowed."""
    scaler = getattr(run.backend, "scaler", None)
    return [] if scaler is None else list(scaler._unscaled.items())


def state_of(run: Run) -> tuple[Any, ...]:
    """Return what decides, beside the batch and what Python asks, which operations a step makes."""
    optimizers = run.life.optimizers
    return (
        run.window,
        torch.is_grad_enabled(),
        [(o.phase, o._zeros is None) for o in optimizers],
        [m.training for m in run.module.modules()],
        [(p.requires_grad, p.grad is None) for p in run.module.parameters()],
        [(optimizers.index(o), len(flags)) for o, flags in flags_of(run)],
    )
