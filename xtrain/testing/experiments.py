"""The table of experiments, and how one is performed on either side.

An experiment is a LightningModule and the hand-written loop that says what it must come to. Both
leave an `Outcome`: parameters, counters and notes, all as CPU values. A row, and `perform` bound to one,
can be pickled, so that a launcher may send it to other processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from xtrain import Trainer
from xtrain.contract import Backend, Capabilities
from xtrain.precision import PRECISIONS, Precision
from xtrain.testing import modules as m
from xtrain.testing import modules_more as mm
from xtrain.testing import modules_scaling as ms
from xtrain.testing import oracle as o
from xtrain.testing import oracle_more as om
from xtrain.testing import oracle_scaling as sc
from xtrain.testing.networks import Batch, adam, batches

Refusal = Callable[[Capabilities, Precision], str | None]


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
        loader: False trains without any data, for ``max_steps`` or else ``fit(steps=...)``.
        validation: number of validation batches, 0 for none.
    """

    name: str
    module: Callable[[], m.Recorder]
    oracle: Callable[[o.Plain], None]
    batches: int = 4
    epochs: int = 1
    trainer: Mapping[str, Any] = field(default_factory=dict)
    refused: Refusal = refuses_nothing
    scaling: bool = False
    loader: bool = True
    validation: int = 0

    def __str__(self) -> str:
        return self.name


@dataclass
class Outcome:
    """What is left of a run: CPU tensors and plain numbers.

    Attributes:
        parameters: the state dict of the two networks.
        facts: lists of numbers by name: counters, and whatever the training step noted.
    """

    parameters: dict[str, Tensor]
    facts: dict[str, list[float]]


def refuses_lbfgs(capabilities: Capabilities, precision: Precision) -> str | None:
    """LBFGS needs whole parameters and unscaled gradients."""
    if precision.loss_scaling:
        return "lbfgs-scaling"
    return None if capabilities.reevaluating_closures else "lbfgs-backend"


def refuses_sharing(capabilities: Capabilities, precision: Precision) -> str | None:
    """A parameter of two optimizers needs one copy of it, and one unscaling."""
    if precision.loss_scaling:
        return "shared-scaling"
    return None if capabilities.shared_parameters else "shared-backend"


def refuses_values(capabilities: Capabilities, precision: Precision) -> str | None:
    """Clipping single values needs whole gradients."""
    return None if capabilities.value_clipping else "value-clipping"


def _growing(interval: int) -> dict[str, Any]:
    return {"scaler_kwargs": {"init_scale": o.SCALE, "growth_interval": interval}}


_SCALED: dict[str, Any] = {"scaling": True, "batches": 8, "trainer": _growing(sc.GROWTH_INTERVAL)}

EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment("gan", m.Gan, o.gan, epochs=2),
    Experiment("max-steps", m.Gan, o.gan, epochs=3, trainer={"max_steps": 6}),
    Experiment("gan-clip-norm", partial(m.ClippedGan, 0.2), partial(o.gan, clip=o.by_norm)),
    Experiment("gan-measure-norm", partial(m.ClippedGan, float("inf")), partial(o.gan, clip=o.measure)),
    Experiment(
        "gan-clip-value",
        partial(m.ClippedGan, 0.03, "value"),
        partial(o.gan, clip=o.by_value),
        refused=refuses_values,
    ),
    Experiment("accumulate", m.Accumulate, o.accumulate, batches=6),
    Experiment("accumulate-apart", m.AccumulateApart, o.accumulate_apart, batches=6, epochs=2),
    Experiment("frequencies", m.Frequencies, o.frequencies, batches=6),
    Experiment("toggle-pair", partial(m.Toggled, "pair"), o.toggled, batches=6),
    Experiment("toggle-context", partial(m.Toggled, "context"), o.toggled, batches=6),
    Experiment("toggle-model", partial(m.Toggled, "model"), o.toggled, batches=6),
    Experiment("n-critic", m.NCritic, o.n_critic),
    Experiment("shared-loss", m.SharedLoss, o.shared_loss),
    Experiment("closure", m.Closure, partial(o.closure, make=adam)),
    Experiment("closure-positional", partial(m.Closure, positional=True), partial(o.closure, make=adam)),
    Experiment("lbfgs", partial(m.Closure, o.lbfgs), partial(o.closure, make=o.lbfgs), refused=refuses_lbfgs),
    Experiment("schedule-every-step", m.ScheduleEveryStep, o.schedule_every_step),
    Experiment("schedule-sometimes", m.ScheduleSometimes, o.schedule_sometimes, batches=7, epochs=4),
    Experiment("plateau", m.Plateau, o.plateau, epochs=4),
    Experiment("keep-zeros", mm.KeepZeros, om.keep_zeros),
    Experiment("keep-gradients", mm.KeepGradients, om.keep_gradients, batches=6),
    Experiment("retain-graph", mm.RetainGraph, om.retain_graph),
    Experiment("gradient-argument", mm.GradientArgument, om.gradient_argument),
    Experiment("inputs-argument", mm.InputsArgument, om.inputs_argument),
    Experiment("sum-of-losses", mm.SumOfLosses, om.sum_of_losses),
    Experiment("gradient-penalty", mm.GradientPenalty, om.gradient_penalty),
    Experiment("no-grad-first", mm.NoGradFirst, om.no_grad_first),
    Experiment("tied", mm.Tied, om.tied),
    Experiment("shared-layer", mm.SharedLayer, om.shared_layer, refused=refuses_sharing),
    Experiment("temperature", mm.Temperature, om.temperature),
    Experiment("unowned", mm.Unowned, om.unowned),
    Experiment("parameter-groups", mm.ParameterGroups, om.parameter_groups),
    Experiment("automatic", mm.Automatic, om.automatic, epochs=3),
    Experiment(
        "automatic-accumulate",
        mm.Automatic,
        partial(om.automatic, every=2),
        batches=5,
        epochs=2,
        trainer={"accumulate_grad_batches": 2},
    ),
    Experiment(
        "automatic-accumulate-clip",
        mm.Automatic,
        partial(om.automatic, every=2, algorithm="norm"),
        batches=5,
        epochs=2,
        trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.2},
    ),
    Experiment(
        "automatic-value",
        mm.Automatic,
        partial(om.automatic, algorithm="value"),
        trainer={"gradient_clip_val": 0.03, "gradient_clip_algorithm": "value"},
        refused=refuses_values,
    ),
    Experiment(
        "automatic-schedule",
        partial(mm.Automatic, "step"),
        partial(om.automatic, step_interval=True),
        epochs=2,
    ),
    Experiment(
        "validation-between", mm.WithValidation, om.with_validation, trainer={"val_check_interval": 1}, validation=2
    ),
    Experiment("no-loader", m.NoLoader, om.no_loader, loader=False),
    Experiment("no-loader-max-steps", m.NoLoader, om.no_loader, loader=False, trainer={"max_steps": 4}),
    Experiment("scaling-textbook", ms.Textbook, sc.textbook, **_SCALED),
    Experiment("scaling-overflow-in-one", ms.OverflowInOne, sc.overflow_in_one, **_SCALED),
    Experiment(
        "scaling-accumulate-growth",
        partial(ms.AccumulateAcross, broken=()),
        partial(sc.accumulate_across, broken=False),
        **_SCALED,
    ),
    Experiment(
        "scaling-accumulate-overflow", ms.AccumulateAcross, partial(sc.accumulate_across, broken=True), **_SCALED
    ),
    Experiment("scaling-clip-then-wait", ms.ClipThenWait, sc.clip_then_wait, 6, trainer=_growing(1), scaling=True),
    Experiment(
        "scaling-overflow-while-accumulating",
        ms.OverflowWhileAccumulating,
        sc.overflow_while_accumulating,
        **_SCALED,
    ),
    Experiment("scaling-inner-loop", ms.GrowthWithInnerLoop, sc.growth_with_inner_loop, **_SCALED),
    Experiment("scaling-closure", ms.SkippedClosure, sc.skipped_closure, **_SCALED),
    Experiment("scaling-automatic", ms.AutomaticOverflow, sc.automatic_overflow, **_SCALED),
)


def make_trainer(backend: str | Backend, precision: str, options: Mapping[str, Any], **kwargs: Any) -> Trainer:
    """Return a quiet Trainer; under a loss scale it starts where the oracle's does."""
    if PRECISIONS[precision].loss_scaling:
        kwargs = {"scaler_kwargs": {"init_scale": o.SCALE}} | kwargs
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
        world_size: number of ranks that call this together.
        rank: this one's number; it gets its rows of every batch.
    """
    module = experiment.module()
    trainer = make_trainer(backend, precision, options, max_epochs=experiment.epochs, **experiment.trainer)
    data = batches(experiment.batches, world_size, rank)
    if experiment.loader:
        trainer.fit(module, data, as_loader(batches(experiment.validation, world_size, rank, seed=5)))
    else:
        trainer.fit(module, steps=None if "max_steps" in experiment.trainer else len(data))
    return outcome_of(module, trainer)


class Ready:
    """Batches to evaluate that are this rank's already; a list would mean several loaders, a DataLoader is sharded."""

    def __init__(self, data: list[Batch]) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._data)


def as_loader(data: list[Batch]) -> Ready | None:
    """Return a loader of ready batches, or None for none."""
    return Ready(data) if data else None


def expect(experiment: Experiment, precision: str, device: str = "cpu") -> Outcome:
    """Run the experiment's hand-written loop on full batches."""
    max_steps = experiment.trainer.get("max_steps", -1)
    run = o.Plain(precision, batches(experiment.batches), experiment.epochs, device, max_steps)
    experiment.oracle(run)
    return outcome_of(run, run)


def outcome_of(owner: m.Recorder | o.Plain, run: Trainer | o.Plain) -> Outcome:
    """Return the parameters and notes of `owner`, and the counters of `run`."""
    counts = run.step_count if isinstance(run, o.Plain) else [opt.step_count for opt in run.optimizers]
    whole = nullcontext() if isinstance(run, o.Plain) else run.backend.full_parameters(owner)
    facts = {"global_step": [float(run.global_step)], "step_count": _numbers(counts)}
    facts |= {name: _numbers(values) for name, values in owner.notes.items()}
    with whole:
        networks = {k: v.detach().cpu().clone() for k, v in owner.state_dict().items() if k.startswith(_COMPARED)}
    return Outcome(networks, facts)


_COMPARED = ("G.", "D.", "third.")


def _numbers(value: Any) -> list[float]:
    """Return nested lists, tensors, flags and numbers as one flat list of floats."""
    if isinstance(value, list | tuple):
        return [number for item in value for number in _numbers(item)]
    if isinstance(value, Tensor):
        return [float(number) for number in value.detach().cpu().flatten().tolist()]
    return [float(value)]
