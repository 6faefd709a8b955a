"""The conformance suite itself: it passes a sound backend, and notices each broken one."""

import importlib
import pickle
import pkgutil
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from xtrain_backends.eager.backend import EagerBackend

from xtrain import Capabilities, LightningModule, register_backend
from xtrain.contract import Rule
from xtrain.testing import BackendConformance, experiments
from xtrain.testing.experiments import EXPERIMENTS, Outcome, perform
from xtrain.testing.misuse import MISUSES
from xtrain.testing.networks import batches

BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}
SUBJECTS = {
    info.name: importlib.import_module(f"{experiments.__name__}.{info.name}")
    for info in pkgutil.iter_modules(experiments.__path__)
}
NAMES = """
    gan max-steps frequencies n-critic shared-loss no-loader no-loader-max-steps
    gan-clip-norm gan-measure-norm gan-clip-value
    accumulate accumulate-apart keep-zeros keep-gradients
    retain-graph gradient-argument inputs-argument sum-of-losses gradient-penalty no-grad-first
    toggle-pair toggle-context toggle-model closure closure-positional lbfgs
    schedule-every-step schedule-sometimes plateau
    tied shared-layer temperature unowned parameter-groups
    automatic automatic-accumulate automatic-accumulate-clip automatic-value automatic-schedule validation-between
    scaling-textbook scaling-overflow-in-one scaling-accumulate-growth scaling-accumulate-overflow
    scaling-clip-then-wait scaling-overflow-while-accumulating scaling-inner-loop scaling-closure scaling-automatic
"""


@register_backend
class Sound(EagerBackend):
    name = "sound"
    capabilities = Capabilities(
        precisions=frozenset({"32-true", "16-mixed", "bf16-mixed", "bf16-true"}), asynchronous=False
    )

    @classmethod
    def available(cls):
        return None

    def launch(self):
        self.device = torch.device("cpu")


def suite_for(backend):
    tolerances = dict.fromkeys(("32-true", "16-mixed", "bf16-mixed", "bf16-true"), 1e-6)
    return type("Suite", (BackendConformance,), {"backend": backend, "tolerances": tolerances})()


def broken(label, **verbs):
    """Register a backend that is sound but for `verbs`; return its name."""
    register_backend(type(f"Broken{label}", (Sound,), {"name": f"broken-{label}".lower(), **verbs}))
    return f"broken-{label}".lower()


def keeps_gradients(self, optimizer, set_to_none=True):
    if self.scaler is not None:
        self.scaler.forget(optimizer)


def zeroes_everything(self, optimizer, set_to_none=True):
    for other in self._optimizers:
        EagerBackend.zero_grad(self, other, set_to_none)


def never_zeros(self, optimizer, set_to_none=True):
    EagerBackend.zero_grad(self, optimizer, True)


def drops_arguments(self, loss, *args, **kwargs):
    EagerBackend.backward(self, loss, retain_graph=True)


def forgets_the_graph_flag(self, loss, *args, **kwargs):
    kwargs.pop("retain_graph", None)
    EagerBackend.backward(self, loss, *args, **kwargs)


def doubles(self, loss, *args, **kwargs):
    EagerBackend.backward(self, loss * 2, *args, **kwargs)


def clips_nothing(self, optimizer, value, algorithm):
    return EagerBackend.clip_gradients(self, optimizer, float("inf"), "norm")


def clips_by_norm(self, optimizer, value, algorithm):
    return EagerBackend.clip_gradients(self, optimizer, value, "norm")


def returns_clipped_norm(self, optimizer, value, algorithm):
    return EagerBackend.clip_gradients(self, optimizer, value, algorithm).clamp(max=value)


def clips_everything(self, optimizer, value, algorithm):
    parameters = [p for other in self._optimizers for p in other.parameters]
    return torch.nn.utils.clip_grad_norm_(parameters, value)


def steps_all(self, optimizer, closure=None, **kwargs):
    for other in self._optimizers:
        result = EagerBackend.step(self, other, closure)
    return result


def ignores_closures(self, optimizer, closure=None, **kwargs):
    loss = None if closure is None else closure()
    return loss, EagerBackend.step(self, optimizer)[1]


def always_applied(self, optimizer, closure=None, **kwargs):
    return EagerBackend.step(self, optimizer, closure)[0], True


def updates_at_each_step(self, optimizer, closure=None, **kwargs):
    result = EagerBackend.step(self, optimizer, closure)
    EagerBackend.step_boundary(self)
    return result


def unscales_twice(self, optimizer):
    EagerBackend.finalize_gradients(self, optimizer)
    self.scaler.forget(optimizer)
    EagerBackend.finalize_gradients(self, optimizer)


def leaves_accumulated(self):
    if self.scaler is not None:
        self.scaler.update([])


def cached_autocast(self):
    dtype = self.precision.autocast_dtype
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype, cache_enabled=True)


# ---------------------------------------------------------------- the table


def test_no_experiment_is_lost():
    """What a file defines is in the table, once; what the table had stays in it."""
    rows = [row for subject in SUBJECTS.values() for row in getattr(subject, "EXPERIMENTS", ())]
    assert {id(row) for row in rows} == {id(row) for row in EXPERIMENTS}
    assert len(BY_NAME) == len(EXPERIMENTS) == len(rows)
    assert set(NAMES.split()) <= BY_NAME.keys()


def unwrap(made):
    return unwrap(made.func) if isinstance(made, partial) else made


def test_every_module_and_every_loop_is_in_an_experiment():
    """A class or loop that no row uses would look like a check and be none."""
    unwrapped, evaluation = SUBJECTS["unwrapped"], SUBJECTS["evaluation"]
    rows = [*EXPERIMENTS, *SUBJECTS["finalized"].FINALIZED, unwrapped.RAW_OPTIMIZER, unwrapped.DIRECT_BACKWARD]
    used = {ancestor for row in rows for ancestor in unwrap(row.module).__mro__} | {unwrap(row.oracle) for row in rows}
    used |= {evaluation.Evaluated, evaluation.predictions, evaluation.evaluation_loss}  # of `test_evaluation`
    defined = {value for subject in SUBJECTS.values() for value in vars(subject).values() if is_side(value, subject)}
    assert {value.__name__ for value in defined - used} == set()


def is_side(value, subject):
    """Return whether `value` is a module or a loop that `subject` defines itself."""
    code = getattr(value, "__code__", None)
    own = getattr(value, "__module__", None) == subject.__name__
    return own and (is_module(value) or (code is not None and code.co_varnames[:1] == ("run",)))


def is_module(value):
    return isinstance(value, type) and issubclass(value, LightningModule)


def names_in(code):
    nested = [names_in(constant) for constant in code.co_consts if isinstance(constant, type(code))]
    return set(code.co_names).union(*nested)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=str)
def test_the_hand_written_loop_uses_nothing_of_xtrain(experiment):
    """An oracle that ran the code under test would agree with every mistake of it."""
    own = ("xtrain.testing.experiments.", "xtrain.testing.oracle", "xtrain.testing.networks")
    pending, seen = [unwrap(experiment.oracle)], set()
    while pending:
        loop = pending.pop()
        seen.add(loop)
        for value in (loop.__globals__.get(name) for name in names_in(loop.__code__)):
            module = getattr(value, "__module__", None) or ""
            assert not is_module(value)
            assert not module.startswith("xtrain") or module.startswith(own), f"{loop.__name__}: {value}"
            pending += [value] if hasattr(value, "__code__") and value not in seen and "xtrain" in module else []


# ---------------------------------------------------------------- broken backends

MUTANTS = [
    (keeps_gradients, "zero_grad", "gan", "32-true"),
    (zeroes_everything, "zero_grad", "accumulate-apart", "32-true"),
    (never_zeros, "zero_grad", "keep-zeros", "32-true"),
    (drops_arguments, "backward", "gradient-argument", "32-true"),
    (drops_arguments, "backward", "inputs-argument", "32-true"),
    (forgets_the_graph_flag, "backward", "retain-graph", "32-true"),
    (doubles, "backward", "gan", "32-true"),
    (clips_nothing, "clip_gradients", "gan-clip-norm", "32-true"),
    (clips_by_norm, "clip_gradients", "gan-clip-value", "32-true"),
    (returns_clipped_norm, "clip_gradients", "n-critic", "32-true"),
    (clips_everything, "clip_gradients", "shared-loss", "32-true"),
    (steps_all, "step", "frequencies", "32-true"),
    (ignores_closures, "step", "lbfgs", "32-true"),
    (always_applied, "step", "scaling-textbook", "16-mixed"),
    (updates_at_each_step, "step", "scaling-overflow-in-one", "16-mixed"),
    (updates_at_each_step, "step", "scaling-inner-loop", "16-mixed"),
    (unscales_twice, "finalize_gradients", "shared-loss", "16-mixed"),
    (lambda self, optimizer: None, "finalize_gradients", "gan", "16-mixed"),
    (leaves_accumulated, "step_boundary", "scaling-accumulate-growth", "16-mixed"),
    (lambda self: None, "step_boundary", "scaling-textbook", "16-mixed"),
    (lambda self: nullcontext(), "forward_context", "gan", "bf16-mixed"),
    (cached_autocast, "forward_context", "n-critic", "bf16-mixed"),
    (lambda self, batch: batch, "batch_to_device", "gan", "bf16-true"),
    (lambda self, module: None, "setup_module", "gan", "bf16-true"),
]


@pytest.mark.parametrize(
    ("index", "mutant", "verb", "experiment", "precision"),
    [(i, *row) for i, row in enumerate(MUTANTS)],
    ids=[f"{row[0].__name__.strip('<>')}-{row[2]}" for row in MUTANTS],
)
def test_a_broken_verb_is_noticed(index, mutant, verb, experiment, precision):
    suite_for("sound").test_same_as_plain_torch(precision, BY_NAME[experiment])
    suite = suite_for(broken(str(index), **{verb: mutant}))
    with pytest.raises((AssertionError, LookupError, RuntimeError, TypeError, UserWarning)):
        suite.test_same_as_plain_torch(precision, BY_NAME[experiment])


def test_random_sequences_find_what_no_experiment_names():
    def forgets_once(self, optimizer, set_to_none=True):
        if optimizer.step_count != 1:
            EagerBackend.zero_grad(self, optimizer, set_to_none)

    with pytest.raises((AssertionError, RuntimeError, UserWarning)):
        suite_for(broken("once", zero_grad=forgets_once)).test_random_legal_sequences("32-true")


def test_a_missing_verb_in_the_life_of_a_gradient_is_noticed():
    def finalizes_by_itself(self, optimizer, value, algorithm):
        self.finalize_gradients(optimizer)
        return EagerBackend.clip_gradients(self, optimizer, value, algorithm)

    suite_for("sound").test_life_of_a_gradient(True)
    with pytest.raises(AssertionError):
        suite_for(broken("life", clip_gradients=finalizes_by_itself)).test_life_of_a_gradient(True)


def test_a_guard_that_is_off_is_noticed():
    misuse = next(m for m in MISUSES if m.name == "direct-backward-on-top")
    suite_for("sound").test_misuse("16-mixed", misuse)
    with pytest.raises(pytest.fail.Exception):
        suite_for(broken("guard", unseen_gradient=lambda self: None)).test_misuse("16-mixed", misuse)


def test_state_that_does_not_come_back_is_noticed():
    suite_for("sound").test_state_is_portable("16-mixed")
    loses = broken("state", load_state_dict=lambda self, state: setattr(self.scaler, "current_scale", 3.0))
    with pytest.raises(AssertionError):
        suite_for(loses).test_state_is_portable("16-mixed")


def test_an_unlisted_precision_is_noticed():
    with pytest.raises(AssertionError, match="promised"):
        suite_for("sound").test_precision_is_kept_or_refused("bf16-true")


def test_a_rule_of_a_backend_needs_a_run_that_it_refuses():
    extra = Rule("extra", "this", "because", "do that", "nowhere", lambda situation: None)
    suite = suite_for(broken("rules", rules=(extra,)))
    with pytest.raises(AssertionError, match="provocations"):
        suite.test_rule("extra")


def test_ranks_that_differ_are_noticed_and_facts_are_averaged():
    suite, one = suite_for("sound"), {"G.w": torch.ones(2)}
    expected = Outcome(one, {"loss": [2.0]})
    suite.compare([Outcome(one, {"loss": [1.0]}), Outcome(one, {"loss": [3.0]})], expected, "32-true")
    with pytest.raises(AssertionError, match="between ranks"):
        suite.compare(
            [expected, Outcome({"G.w": torch.tensor([1.0, 1.0 + 1e-7])}, {"loss": [2.0]})], expected, "32-true"
        )
    with pytest.raises(AssertionError, match="loss differs"):
        suite.compare([Outcome(one, {"loss": [1.0]})] * 2, expected, "32-true")


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_every_batch(world_size):
    whole, shares = batches(3), [batches(3, world_size, rank) for rank in range(world_size)]
    for index, (x, z) in enumerate(whole):
        for position, tensor in enumerate((x, z)):
            rows = torch.cat([share[index][position] for share in shares])
            assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, tensor.tolist()))


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=str)
def test_an_experiment_can_be_sent_to_other_processes(experiment):
    job = pickle.loads(pickle.dumps(partial(perform, experiment, "sound", "32-true", {})))
    assert job.args[0].name == experiment.name


def test_experiments_need_neither_pytest_nor_hypothesis():
    code = (
        "import sys; sys.modules['pytest'] = sys.modules['hypothesis'] = None\n"
        "import xtrain.testing.experiments\n"
        "try: xtrain.testing.BackendConformance\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "pip install 'xtrain-torch[testing]'" in done.stdout, done.stderr
