"""An experiment, and how it runs with xtrain and by hand.

An experiment is a LightningModule and the hand-written loop in plain PyTorch that it is compared with. Both
return an `Outcome`: parameters, counters and notes, all as CPU values. An experiment, and `perform` bound to one,
can be pickled, so that a launcher can send it to other processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from xtrain import Trainer
from xtrain.contract import Backend, Capabilities
from xtrain.precision import PRECISIONS, Precision
from xtrain.testing.networks import Batch, batches
from xtrain.testing.oracle import SCALE, Plain
from xtrain.testing.recorder import Recorder

Refusal = Callable[[Capabilities, Precision], str | None]

_COMPARED = ("G.", "D.", "third.")


def refuses_nothing(capabilities: Capabilities, precision: Precision) -> str | None:
    """Most experiments run everywhere."""
    return None


@dataclass(frozen=True)
class Experiment:
    """One thing that must mean the same everywhere.

    Attributes:
        name: shown as the test's id.
        module: makes the LightningModule.
        oracle: the loop in plain PyTorch.
        batches: length of an epoch.
        epochs: number of epochs.
        trainer: further arguments of the Trainer.
        refused: returns the id of the rule that refuses the experiment on a backend, or None.
        scaling: only makes sense under a loss scale.
        second_order: differentiates a gradient.
        loader: False trains without any data, for ``max_steps`` or else ``fit(steps=...)``.
        validation: number of validation batches, 0 for none.
    """

    name: str
    module: Callable[[], Recorder]
    oracle: Callable[[Plain], None]
    batches: int = 4
    epochs: int = 1
    trainer: Mapping[str, Any] = field(default_factory=dict)
    refused: Refusal = refuses_nothing
    scaling: bool = False
    second_order: bool = False
    loader: bool = True
    validation: int = 0

    def __str__(self) -> str:
        return self.name


@dataclass
class Outcome:
    """The results of a run: CPU tensors and plain numbers.

    Attributes:
        parameters: the state dict of the two networks.
        facts: lists of numbers by name: counters, and whatever the training step noted.
    """

    parameters: dict[str, Tensor]
    facts: dict[str, list[float]]


def make_trainer(backend: str | Backend, precision: str, options: Mapping[str, Any], **kwargs: Any) -> Trainer:
    """Return a quiet Trainer; under a loss scale it starts where the oracle's does."""
    if PRECISIONS[precision].loss_scaling:
        kwargs = {"scaler_kwargs": {"init_scale": SCALE}} | kwargs
    quiet = {"logger": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    backend_options = dict(options) or None
    return Trainer(backend=backend, precision=precision, backend_options=backend_options, **(quiet | kwargs))


def perform(
    experiment: Experiment,
    backend: str,
    precision: str,
    options: Mapping[str, Any],
    world_size: int = 1,
    rank: int = 0,
) -> Outcome:
    """Train the experiment's module with xtrain.

    Args:
        experiment: a row of `EXPERIMENTS`.
        backend: a registered name.
        precision: a name of `xtrain.precision.PRECISIONS`.
        options: the backend's options.
        world_size: number of ranks, all of which call this.
        rank: the number of this rank, which gets its rows of every batch.
    """
    module = experiment.module()
    trainer = make_trainer(backend, precision, options, max_epochs=experiment.epochs, **experiment.trainer)
    data = batches(experiment.batches, world_size, rank)
    if experiment.loader:
        trainer.fit(module, data, as_loader(batches(experiment.validation, world_size, rank, seed=5)))
    else:
        trainer.fit(module, steps=None if "max_steps" in experiment.trainer else len(data))
    return outcome_of(module, trainer)


class PresplitLoader:
    """This rank's batches for an evaluation; a list would mean several loaders, a DataLoader would be sharded."""

    def __init__(self, data: list[Batch]) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._data)


def as_loader(data: list[Batch]) -> PresplitLoader | None:
    """Return a loader of ready batches, or None for none."""
    return PresplitLoader(data) if data else None


def expect(experiment: Experiment, precision: str, device: str = "cpu") -> Outcome:
    """Run the experiment's hand-written loop on full batches."""
    max_steps = experiment.trainer.get("max_steps", -1)
    run = Plain(precision, batches(experiment.batches), experiment.epochs, device, max_steps)
    experiment.oracle(run)
    return outcome_of(run, run)


def _step_counts(module: Any) -> list[int]:
    wrapped = module.optimizers()
    return [optimizer.step_count for optimizer in (wrapped if isinstance(wrapped, list) else [wrapped])]


def outcome_of(owner: Recorder | Plain, run: Trainer | Plain) -> Outcome:
    """Return the parameters and notes of `owner`, and the counters of `run`."""
    counts = run.step_count if isinstance(run, Plain) else _step_counts(owner)
    full_parameters = nullcontext() if isinstance(run, Plain) else run.backend.full_parameters(owner)
    facts = {"global_step": [float(run.global_step)], "step_count": _numbers(counts)}
    notes = owner.notes if isinstance(run, Plain) else run.backend.to_cpu(owner.notes)
    facts |= {name: _numbers(values) for name, values in notes.items()}
    with full_parameters:
        networks = {k: v.detach().cpu().clone() for k, v in owner.state_dict().items() if k.startswith(_COMPARED)}
    return Outcome(networks, facts)


def _numbers(value: Any) -> list[float]:
    """Return nested lists, tensors, flags and numbers as one flat list of floats."""
    if isinstance(value, list | tuple):
        return [number for item in value for number in _numbers(item)]
    if isinstance(value, Tensor):
        return [float(number) for number in value.detach().cpu().flatten().tolist()]
    return [float(value)]
