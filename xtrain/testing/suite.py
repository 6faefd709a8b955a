"""`BackendConformance`: the tests a backend inherits.

Each test compares xtrain on the backend with a hand-written loop in plain PyTorch, or checks that what cannot work
is refused. xtrain always runs first: some devices must be started before anything else computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from xtrain.errors import ProtocolError, UnsupportedCombinationError
from xtrain.precision import PRECISIONS
from xtrain.registry import get_backend_class
from xtrain.rules import all_rules
from xtrain.testing.comparison import Experiment, Outcome, as_loader, expect, make_trainer, outcome_of, perform
from xtrain.testing.experiments import EXPERIMENTS
from xtrain.testing.experiments.clipping import ClippedGan
from xtrain.testing.experiments.evaluation import Evaluated, evaluation_loss, predictions
from xtrain.testing.experiments.finalized import FINALIZED
from xtrain.testing.experiments.gan import Gan
from xtrain.testing.experiments.unwrapped import DIRECT_BACKWARD, RAW_OPTIMIZER
from xtrain.testing.misuse import MISUSES, PROVOCATIONS, Misuse, Provocation, UnreadableData
from xtrain.testing.networks import batches
from xtrain.testing.oracle import Plain
from xtrain.testing.probes import (
    Interrupted,
    KeepsBatch,
    SavesState,
    communicate,
    expected_messages,
    fit_plan,
    perform_plan,
    record,
    unordered_schedulers,
)
from xtrain.testing.sequences import Plan, SequenceModule, plans, run_by_hand

Job = Callable[..., Any]

TOLERANCES: Mapping[str, float] = {
    "32-true": 1e-6,
    "bf16-mixed": 2e-3,
    "16-mixed": 5e-4,
    "bf16-true": 2e-2,
    "16-true": 2e-3,
}
"""Largest difference to the hand-written loop, absolute and relative, by precision."""


class BackendConformance:
    """Inherit, and name the backend; see `xtrain.testing`.

    Attributes:
        backend: the registered name.
        precisions: what to test; each must be among the backend's capabilities.
        options: options of the backend.
        tolerances: see `TOLERANCES`; tighten them where the device computes as the oracle does. The key
            ``"bf16-mixed-lbfgs"`` is for that experiment alone.
        oracle_device: where the hand-written loops run.
        provocations: a run for each rule that only this backend has, by rule id.
        early_gradients: whether ``.grad`` has a backward's gradients before they are finalized, so that an edit of
            them can be noticed.
        second_order: whether a gradient may be differentiated (``create_graph=True``); else that raises.
        direct_calls: whether ``loss.backward()`` and the user's own optimizer may be used where no loss is scaled.
        sequence_examples: how many random programs to run per precision.
    """

    pytestmark: ClassVar = pytest.mark.filterwarnings("ignore:Expected a step of an optimizer")  # some train nothing

    backend: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]] = ("32-true",)
    options: ClassVar[Mapping[str, Any]] = {}
    tolerances: ClassVar[Mapping[str, float]] = TOLERANCES
    oracle_device: ClassVar[str] = "cpu"
    provocations: ClassVar[Mapping[str, Provocation]] = {}
    direct_calls: ClassVar[bool] = True
    early_gradients: ClassVar[bool] = True
    second_order: ClassVar[bool] = True
    sequence_examples: ClassVar[int] = 60

    def launch(self, job: Job) -> list[Any]:
        """Run ``job(world_size=..., rank=...)`` on every rank and return what it returned, in order of rank.

        Override it for several processes; `job` can be pickled.
        """
        return [job(world_size=1, rank=0)]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Give each test its rows of the tables."""
        names = metafunc.fixturenames
        scaled = {p: PRECISIONS[p].loss_scaling for p in self.precisions}
        if "experiment" in names:
            rows = [(p, e) for p in self.precisions for e in EXPERIMENTS if scaled[p] or not e.scaling]
            metafunc.parametrize("precision, experiment", rows, ids=[f"{p}-{e}" for p, e in rows])
        elif "misuse" in names:
            misuses = [m for m in MISUSES if self.early_gradients or not m.early]
            table = [(p, m) for p in self.precisions for m in misuses if scaled[p] or not m.scaled_only]
            metafunc.parametrize("precision, misuse", table, ids=[f"{p}-{m}" for p, m in table])
        elif "rule" in names:
            metafunc.parametrize(
                "rule", [r.id for r in all_rules([get_backend_class(self.backend)]) if r.id != "precision"]
            )
        elif "any_precision" in names:
            metafunc.parametrize("any_precision", sorted(PRECISIONS))
        elif "precision" in names:
            metafunc.parametrize("precision", self.precisions)

    # ---------------------------------------------------------------- the same parameters

    def test_same_as_plain_torch(self, precision: str, experiment: Experiment) -> None:
        """Parameters, norms, learning rates and counters are those of the hand-written loop, or it is refused."""
        rule = experiment.refused(get_backend_class(self.backend).capabilities, PRECISIONS[precision])
        job = partial(perform, experiment, self.backend, precision, self.options)
        if rule is not None:
            with pytest.raises(UnsupportedCombinationError) as refusal:
                self.launch(job)
            assert f"[{rule}]" in str(refusal.value)
            return
        if experiment.second_order and not self.second_order:
            with pytest.raises(ProtocolError, match="create_graph=True"):
                self.launch(job)
            return
        row = f"{precision}-{experiment}"
        outcomes = self.launch(job)
        expected = expect(experiment, precision, self.oracle_device)
        self.compare(outcomes, expected, row if row in self.tolerances else precision)

    def test_random_legal_sequences(self, precision: str) -> None:
        """Any legal order of the verbs trains what it trains in plain PyTorch."""

        def check(plan: Plan) -> None:
            outcomes = self.launch(partial(perform_plan, plan, self.backend, precision, self.options))
            run = Plain(precision, batches(len(plan.program)), device=self.oracle_device)
            with unordered_schedulers():
                run_by_hand(run, plan)
            self.compare(outcomes, outcome_of(run, run), precision)

        self._explore(check, plans(illegal=False, editable=self._editable()))

    def test_random_illegal_sequences(self, precision: str) -> None:
        """The verb that is out of order raises, and no verb before it."""

        def check(plan: Plan) -> None:
            module = SequenceModule(plan)
            with pytest.raises(ProtocolError):
                fit_plan(module, self.backend, precision, self.options)
            assert module.position == sum(map(len, plan.program)), f"raised at verb {module.position} of {plan}"

        self._explore(check, plans(illegal=True, editable=self._editable()))

    def _editable(self) -> bool:
        return get_backend_class(self.backend).capabilities.editable_gradients

    def _explore(self, check: Callable[[Plan], None], drawn: SearchStrategy[Plan]) -> None:
        fixed: Any = {"deadline": None, "derandomize": True, "database": None, "report_multiple_bugs": False}
        settings(max_examples=self.sequence_examples, **fixed)(given(drawn)(check))()

    def compare(self, outcomes: list[Outcome], expected: Outcome, precision: str) -> None:
        """Compare all ranks with each other, bit by bit, and their mean facts with the oracle's."""
        tolerance = self.tolerances[precision]
        for other in outcomes[1:]:
            for name, value in outcomes[0].parameters.items():
                assert torch.equal(other.parameters[name], value), f"{name} differs between ranks"
        for name, value in expected.parameters.items():
            _close(outcomes[0].parameters[name], value, tolerance, name)
        assert outcomes[0].facts.keys() == expected.facts.keys()
        for name, numbers in expected.facts.items():
            received = torch.tensor([o.facts[name] for o in outcomes], dtype=torch.float64).mean(0)
            _close(received, torch.tensor(numbers, dtype=torch.float64), tolerance, name)

    def test_evaluation(self, precision: str) -> None:
        """`validate`, `test` and `predict` compute what the networks compute, and leave them alone."""
        module = Evaluated()
        trainer = make_trainer(self.backend, precision, self.options)
        data = batches(3)
        loader = as_loader(data)
        validated, tested = trainer.validate(module, loader), trainer.test(module, loader)
        predicted = trainer.predict(module, loader)
        tolerance = self.tolerances[precision]
        run = Plain(precision, data, device=self.oracle_device)
        expected = evaluation_loss(run).cpu().double()
        for result in (validated, tested):
            assert [set(metrics) for metrics in result] == [{"loss"}]
            _close(torch.tensor(result[0]["loss"], dtype=torch.float64), expected, tolerance, "loss")
        assert len(predicted) == len(data)
        for received, wanted in zip(predicted, predictions(run), strict=True):
            _close(received.detach().cpu(), wanted.cpu(), tolerance, "prediction")

    # ---------------------------------------------------------------- what is refused

    def test_misuse(self, precision: str, misuse: Misuse) -> None:
        """A wrong order or argument raises, with what was expected, what was received and the fix."""
        trainer = make_trainer(self.backend, precision, self.options, max_epochs=1)
        with pytest.raises(misuse.error) as caught:
            trainer.fit(misuse.module(), batches(2))
        for part in ("Expected ", "Received: ", "Fix: ", misuse.says):
            assert part in str(caught.value)

    def test_rule(self, rule: str) -> None:
        """Each rule of the table refuses its combination before the data is touched."""
        provocation = (PROVOCATIONS | dict(self.provocations)).get(rule)
        assert provocation is not None, f"give a run that rule {rule!r} refuses in {type(self).__name__}.provocations"
        if not provocation.applies(get_backend_class(self.backend).capabilities):
            return  # allowed here: some experiment trains with it
        precision = provocation.precision or self.precisions[0]
        trainer = make_trainer(self.backend, precision, self.options, max_epochs=1, **provocation.trainer)
        with pytest.raises(UnsupportedCombinationError) as refusal:
            trainer.fit(provocation.module(), UnreadableData())
        assert any(f"[{rule}]" in violation and "Fix:" in violation for violation in refusal.value.violations)

    def test_all_violations_are_told_at_once(self) -> None:
        """The error of a run that breaks two rules names both."""
        flags: dict[str, Any] = {"accumulate_grad_batches": 2, "scaler_kwargs": {"init_scale": 8.0}}
        trainer = make_trainer(self.backend, "32-true", self.options, max_epochs=1, **flags)
        with pytest.raises(UnsupportedCombinationError) as refusal:
            trainer.fit(Gan(), UnreadableData())
        for rule in ("[manual-flags]", "[scaler-kwargs]"):
            assert any(rule in violation for violation in refusal.value.violations)

    def test_precision_is_kept_or_refused(self, any_precision: str) -> None:
        """Precisions outside the backend's row are refused; those inside are tested here."""
        if any_precision in get_backend_class(self.backend).capabilities.precisions:
            assert any_precision in self.precisions, (
                f"{any_precision} is promised but not among {type(self).__name__}.precisions"
            )
            return
        with pytest.raises(UnsupportedCombinationError, match=r"\[precision\]"):
            make_trainer(self.backend, any_precision, self.options, max_epochs=1).fit(Gan(), UnreadableData())

    def test_raw_optimizer(self, precision: str) -> None:
        """``optimizer.optimizer`` steps as in plain PyTorch where nothing is lost by that, and raises elsewhere."""
        self._plain_or_refused(RAW_OPTIMIZER, precision, nullcontext())

    def test_direct_backward(self, precision: str) -> None:
        """``loss.backward()`` warns and trains as usual where nothing is lost by that, and raises elsewhere."""
        warning = pytest.warns(UserWarning, match="manual_backward")
        self._plain_or_refused(DIRECT_BACKWARD, precision, warning)

    @pytest.mark.parametrize("finalized", FINALIZED, ids=str)
    def test_finalized_gradients(self, precision: str, finalized: Experiment) -> None:
        """Finalized gradients may be read, edited and added to where they are in ``.grad``; else that raises."""
        job = partial(perform, finalized, self.backend, precision, self.options)
        if not self._editable():
            with pytest.raises(ProtocolError):
                self.launch(job)
            return
        self.compare(self.launch(job), expect(finalized, precision, self.oracle_device), precision)

    def _plain_or_refused(self, experiment: Experiment, precision: str, warning: AbstractContextManager[Any]) -> None:
        job = partial(perform, experiment, self.backend, precision, self.options)
        if PRECISIONS[precision].loss_scaling or not self.direct_calls:
            with pytest.raises(ProtocolError):
                self.launch(job)
            return
        with warning:
            outcomes = self.launch(job)
        self.compare(outcomes, expect(experiment, precision, self.oracle_device), precision)

    # ---------------------------------------------------------------- the order of calls, state and data

    @pytest.mark.parametrize("clipped", [True, False])
    def test_life_of_a_gradient(self, clipped: bool) -> None:
        """The backend's verbs are called in order, with one finalize per step and one boundary per training step."""
        trainer = make_trainer(self.backend, self.precisions[0], self.options, max_epochs=1)
        calls = record(trainer.backend)
        trainer.fit(ClippedGan(0.2) if clipped else Gan(), batches(3))
        clip = ["clip_gradients"] if clipped else []
        life = ["zero_grad", "backward", "finalize_gradients", *clip, "step"]
        assert calls == [*life, *life, "step_boundary"] * 3

    def test_boundary_in_evaluation(self) -> None:
        """Validation, test and prediction steps end at a boundary too."""
        trainer = make_trainer(self.backend, self.precisions[0], self.options)
        calls = record(trainer.backend)
        for run in (trainer.validate, trainer.test, trainer.predict):
            run(Evaluated(), as_loader(batches(2)))
        assert calls == ["step_boundary"] * 6

    @pytest.mark.parametrize("spelling", ["toggled_optimizer", "toggle_model"])
    def test_toggles_end_with_an_exception(self, spelling: str) -> None:
        """Nested toggles restore every ``requires_grad`` when an exception leaves them, caught or not."""
        module = Interrupted(spelling)
        with pytest.raises(KeyError, match="on purpose"):
            make_trainer(self.backend, self.precisions[0], self.options, max_epochs=1).fit(module, batches(2))
        assert module.notes["nested"] == [[False, True, False]]
        assert module.notes["outer"] == [[False, False, True]]
        assert module.notes["caught"] == [[False, True, True]]
        assert module.flags() == [False, True, True]

    def test_state_is_portable(self, precision: str) -> None:
        """The backend's state survives ``torch.save`` and a load that runs no code, and is the same after it."""
        trainer = make_trainer(self.backend, precision, self.options, max_epochs=1)
        module = SavesState()
        trainer.fit(module, batches(2))
        saved, restored = module.states
        _same(saved, restored)

    def test_batches_move_whole(self, precision: str) -> None:
        """Nested batches keep their structure; floats take the policy's dtype, integers keep theirs."""
        module = KeepsBatch()
        batch = {"x": [torch.ones(2, 3), (torch.arange(2), "name")], "n": 3}
        make_trainer(self.backend, precision, self.options, max_epochs=1).fit(module, [batch])
        moved = module.batch
        dtype = PRECISIONS[precision].parameter_dtype or torch.float32
        assert moved["x"][1][1] == "name"
        assert moved["n"] == 3
        assert isinstance(moved["x"][1], tuple)
        assert (moved["x"][0].dtype, moved["x"][1][0].dtype) == (dtype, torch.int64)
        assert {t.device for t in (moved["x"][0], moved["x"][1][0])} == {module.device}
        assert moved["x"][1][0].cpu().tolist() == [0, 1]

    def test_collectives(self) -> None:
        """Collectives return every rank's values, with gradients where asked for, and change no input."""
        received = self.launch(partial(communicate, self.backend, self.precisions[0], self.options))
        assert received == [expected_messages(rank, len(received)) for rank in range(len(received))]


def _close(received: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    torch.testing.assert_close(
        received,
        expected.cpu(),
        atol=tolerance,
        rtol=tolerance,
        msg=lambda text: f"{name} differs from the hand-written loop: {text}",
    )


def _same(saved: Any, restored: Any) -> None:
    if isinstance(saved, dict):
        assert saved.keys() == restored.keys()
        for key, value in saved.items():
            _same(value, restored[key])
    elif isinstance(saved, Tensor):
        assert saved.is_cpu
        assert torch.equal(saved, restored)
    else:
        assert saved == restored
