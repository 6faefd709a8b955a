"""`CompiledConformance`: each experiment with ``compile="step"`` trains the same, or says why it ran eagerly."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from xtrain.precision import PRECISIONS
from xtrain.registry import get_backend_class
from xtrain.testing.comparison import Experiment, Outcome, as_loader, expect, make_trainer, outcome_of
from xtrain.testing.experiments import EXPERIMENTS
from xtrain.testing.networks import batches

_ASKS = "whether the loss scaler let an optimizer step was asked"

RUNS_EAGERLY: Mapping[str, str] = {
    "no-loader": "aten.full",  # a number that Python computes from batch_idx
    "no-loader-max-steps": "aten.full",
    "never-reached": "",  # too short: no optimizer ever makes its state
    "scaling-closure": _ASKS,
    "scaling-overflow-in-one": _ASKS,
    "scaling-overflow-while-accumulating": _ASKS,
    "scaling-textbook": _ASKS,
    "16-mixed-conditional-loss": _ASKS,
}
"""Experiments of which steps are not replayed, with a part of the reason that the user is told.

A precision before the name means it alone."""

_REFUSED = {"lbfgs"}  # by a rule


class CompiledConformance:
    """Inherit, and name the backend. Compared are parameters and counters; notes are Python's, and not taken.

    Attributes:
        backend: the registered name.
        tolerances: by precision. An optimizer made of tensors counts its steps in fp32, as torch's ``capturable``
            does: its bias correction is off by 1e-5 in the first steps.
        runs_eagerly: see `RUNS_EAGERLY`.
    """

    backend: ClassVar[str]
    tolerances: ClassVar[Mapping[str, float]] = {"32-true": 5e-5, "bf16-mixed": 5e-3, "16-mixed": 5e-3}
    runs_eagerly: ClassVar[Mapping[str, str]] = RUNS_EAGERLY

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Give the test its rows."""
        capabilities = get_backend_class(self.backend).capabilities
        rows = [
            (precision, longer(experiment))
            for precision in self.tolerances
            for experiment in EXPERIMENTS
            if PRECISIONS[precision].loss_scaling or not experiment.scaling
            if experiment.refused(capabilities, PRECISIONS[precision]) is None
            if experiment.name not in _REFUSED
        ]
        metafunc.parametrize("precision, experiment", rows, ids=[f"{p}-{e}" for p, e in rows])

    def test_compiled_step(self, precision: str, experiment: Experiment) -> None:
        """Parameters and counters are the hand-written loop's; steps were replayed, or the reason is expected."""
        outcome, step = perform_compiled(experiment, self.backend, precision)
        if experiment.scaling:  # the oracle counts on few batches; the eager step is compared with it elsewhere
            expected, _ = perform_compiled(experiment, self.backend, precision, None)
        else:
            expected = expect(experiment, precision)
        for name, value in expected.parameters.items():
            tolerance = self.tolerances[precision]
            torch.testing.assert_close(outcome.parameters[name], value, atol=tolerance, rtol=tolerance)
        for name in ("global_step", "step_count"):
            assert outcome.facts[name] == expected.facts[name]
        name = experiment.name
        reason = self.runs_eagerly.get(f"{precision}-{name}", self.runs_eagerly.get(name))
        if reason is None:
            assert step.reasons == []
            assert step.replays > 0
        else:
            assert step.replays == 0 or reason == _ASKS  # only some ways through the step do
            assert reason in "".join(step.reasons)


def longer(experiment: Experiment) -> Experiment:
    """Return `experiment` with enough steps to be recorded twice, replayed, and compared in a second epoch."""
    return replace(experiment, batches=2 * experiment.batches, epochs=experiment.epochs + experiment.loader)


@contextmanager
def without_inductor() -> Iterator[None]:
    """Replay the functional operations as they are: a compiler would take half a minute for each experiment."""
    from xtrain.compiled import building, step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "build", lambda recorded: building.functional(recorded.recording))
        yield


def perform_compiled(
    experiment: Experiment, backend: str, precision: str, compile: str | None = "step"
) -> tuple[Outcome, Any]:
    """Train the experiment's module with ``compile="step"``, or as `compile` says.

    Returns:
        The `Outcome`, and the run's `xtrain.compiled.step.CompiledStep`.
    """
    module = experiment.module()
    module.takes_notes = False
    settings = {**experiment.trainer, "max_epochs": experiment.epochs, "compile": compile}
    trainer = make_trainer(backend, precision, {}, **settings)
    data = batches(experiment.batches)
    with without_inductor(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Training steps run eagerly")
        if experiment.loader:
            trainer.fit(module, data, as_loader(batches(experiment.validation, seed=5)))
        else:
            trainer.fit(module, steps=None if "max_steps" in experiment.trainer else len(data))
    return outcome_of(module, trainer), trainer.compiled_step
