"""Every ZeRO stage on two processes: the same parameters as plain PyTorch, and what only DeepSpeed can get wrong."""

import copy
from dataclasses import replace
from functools import partial

import jobs
import pytest
import rank_jobs
import torch
from fresh import fresh
from hypothesis import given, settings

from xtrain import ConfigurationError, ProtocolError, Trainer, UnsupportedCombinationError
from xtrain.testing import BackendConformance
from xtrain.testing.experiments import EXPERIMENTS, expect, outcome_of, perform
from xtrain.testing.experiments.closures import Closure
from xtrain.testing.experiments.gan import Gan
from xtrain.testing.networks import batches
from xtrain.testing.oracle import Plain
from xtrain.testing.probes import communicate, expected_messages, unordered_schedulers
from xtrain.testing.ranks import Ranks
from xtrain.testing.sequences import plans, run_by_hand

BY_NAME = {e.name: e for e in EXPERIMENTS}
ALLOWED = [e for e in EXPERIMENTS if e.name not in ("lbfgs", "shared-layer")]
STAGES = (0, 1, 2, 3)
# In low precision each rank rounds the gradient of its own half of the batch; the oracle rounds the whole.
TOLERANCES = {"32-true": 1e-6, "bf16-mixed": 1e-2, "16-mixed": 1.5e-3, "bf16-true": 4e-2}
CHOSEN = (
    "gan-clip-norm",
    "accumulate-apart",
    "keep-gradients",
    "toggle-context",
    "temperature",
    "unowned",
    "validation-between",
)

PARTITIONED = {"config": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}}

by_stage = pytest.mark.parametrize("stage", STAGES)


class Pair(BackendConformance):
    """The suite's comparison, for outcomes of two processes."""

    __test__ = False
    tolerances = TOLERANCES


@pytest.fixture(scope="module")
def pair():
    ranks = Ranks(2, jobs.import_deepspeed)
    yield ranks
    ranks.close()


def same_as_torch(pair, experiment, precision, options):
    outcomes = pair.run(partial(perform, experiment, "deepspeed", precision, options))
    Pair().compare(outcomes, expect(experiment, precision), precision)


# ---------------------------------------------------------------- the same parameters


@by_stage
@pytest.mark.parametrize("experiment", [e for e in ALLOWED if not e.scaling], ids=str)
def test_two_processes_train_as_one(pair, experiment, stage):
    same_as_torch(pair, experiment, "32-true", {"stage": stage})


@by_stage
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_two_processes_in_low_precision(pair, precision, stage):
    for name in CHOSEN:
        same_as_torch(pair, BY_NAME[name], precision, {"stage": stage})


@by_stage
def test_overflow_on_one_rank_skips_that_step_on_all(pair, stage):
    for experiment in (e for e in EXPERIMENTS if e.scaling):
        same_as_torch(pair, experiment, "16-mixed", {"stage": stage})


@pytest.mark.parametrize("name", [*CHOSEN, "shared-loss", "retain-graph", "inputs-argument", "automatic-accumulate"])
def test_parameters_that_are_really_partitioned(pair, name):
    same_as_torch(pair, BY_NAME[name], "32-true", {"stage": 3, "config": jobs.PARTITIONED})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_optimizers(pair, stage):
    for name in (*CHOSEN, "gan-clip-value"):
        same_as_torch(pair, BY_NAME[name], "32-true", {"stage": stage, "offload_optimizer": "cpu"})
    same_as_torch(pair, BY_NAME["scaling-textbook"], "16-mixed", {"stage": stage, "offload_optimizer": "cpu"})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_small_buckets(pair, stage):
    zero = {"reduce_bucket_size": 16, "sub_group_size": 10, "overlap_comm": True, "contiguous_gradients": False}
    for name in CHOSEN:
        same_as_torch(pair, BY_NAME[name], "32-true", {"stage": stage, "config": {"zero_optimization": zero}})


@by_stage
def test_random_sequences(pair, stage):
    def check(plan):
        outcomes = pair.run(partial(jobs.same_program, plan, {"stage": stage}))
        run = Plain("32-true", batches(len(plan.program)))
        with unordered_schedulers():
            run_by_hand(run, plan)
        Pair().compare(outcomes, outcome_of(run, run), "32-true")

    config = settings(max_examples=12, deadline=None, derandomize=True, database=None)
    config(given(plans(illegal=False, editable=False))(check))()


def test_gradient_penalty_on_a_partitioned_network(pair):
    experiment = replace(BY_NAME["gradient-penalty"], module=jobs.WholePenalty)
    same_as_torch(pair, experiment, "32-true", {"stage": 3, "config": jobs.PARTITIONED})


@pytest.mark.parametrize("stage", [0, 1, 2])  # on stage 3 all ranks must run the same layers, which gather together
def test_a_parameter_that_only_one_rank_reaches(pair, stage):
    for parameters in pair.run(partial(jobs.sometimes, {"stage": stage})):
        torch.testing.assert_close(parameters, jobs.sometimes_by_hand(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("what", "first_difference"),
    [
        ("shape", r"'parameter G.last.weight: shape \(4, 6\).*' on rank 0, but '.*shape \(5, 6\).*' on rank 1"),
        ("class", "'optimizer 1: Adam' on rank 0, but 'optimizer 1: SGD' on rank 1"),
    ],
)
def test_ranks_that_train_different_things_are_refused(pair, what, first_difference):
    with pytest.raises(ConfigurationError, match=first_difference):
        pair.run(partial(rank_jobs.odd, what, {"stage": 2}, backend="deepspeed"))


def test_each_rank_draws_its_own_noise_in_a_run(pair):
    (first, after), (second, other) = pair.run(partial(rank_jobs.drawn, backend="deepspeed"))
    assert len({number for runs in (first, second) for number, _ in runs}) == 4
    assert after == other


def test_collectives_for_users(pair):
    heard = pair.run(partial(communicate, "deepspeed", "32-true", {"stage": 2}))
    assert heard == [expected_messages(rank, 2) for rank in range(2)]


@by_stage
def test_empty_groups_and_sparse_gradients(pair, stage):
    for weights in pair.run(partial(jobs.lookup, {"stage": stage})):
        torch.testing.assert_close(weights, jobs.lookup_by_hand(), atol=1e-6, rtol=0)


@by_stage
def test_ranks_start_from_the_parameters_of_rank_0(pair, stage):
    outcomes = pair.run(partial(jobs.apart, {"stage": stage}))
    Pair().compare(outcomes, expect(replace(BY_NAME["gan"], epochs=1), "32-true"), "32-true")


# ---------------------------------------------------------------- the user's module


@pytest.mark.parametrize("way", ["clamp_", "data.clamp_", "data="])
@by_stage
def test_writes_to_parameters_last(pair, stage, way):
    expected = jobs.clamped_by_hand()
    for options in [{"stage": stage}, {"stage": stage, "config": jobs.PARTITIONED}][: 2 if stage == 3 else 1]:
        for written in pair.run(partial(jobs.write, way, options, "32-true")):
            torch.testing.assert_close(written, expected, atol=1e-6, rtol=0)
    for written in pair.run(partial(jobs.write, way, {"stage": stage}, "bf16-true")):
        torch.testing.assert_close(written, expected, atol=2e-2, rtol=0)


def test_parameters_are_partitioned_in_training_and_whole_where_asked(pair):
    for notes, after in pair.run(partial(jobs.looks, {"stage": 3, "config": jobs.PARTITIONED})):
        assert notes["training"][0] == [0, 0, 0, 0]
        assert notes["root"] == [5, 5, 5, 5]
        assert notes["validation"] == [[18, 6, 24, 4]]
        assert after["sizes"] == [18, 6, 24, 4]
        assert after["image"] == notes["image"][0]
        assert after["predicted"] == 2


@by_stage
def test_the_module_is_a_plain_one_afterwards(pair, stage):
    for _, after in pair.run(partial(jobs.looks, {"stage": stage})):
        assert after["attributes"] == []
        assert after["parameters"] == [[]] * 9
        assert after["hooks"] == 0


@by_stage
def test_an_exception_of_the_user_arrives(pair, stage):
    with pytest.raises(KeyError, match="on purpose"):
        pair.run(partial(jobs.raises, {"stage": stage}))


@pytest.mark.parametrize(
    ("stage", "offload", "skips"), [(0, None, False), (2, None, False), (2, "cpu", True), (3, None, True)]
)
def test_a_nan_gradient_is_applied_as_in_torch_or_skipped(pair, stage, offload, skips):
    options = {"stage": stage, "offload_optimizer": offload}
    for applied, finite in pair.run(partial(jobs.poisoned, options)):
        assert applied == [True, not skips, True, True]
        assert finite is skips


# ---------------------------------------------------------------- what is refused


def test_processes_must_fit_the_devices(pair):
    with pytest.raises(ConfigurationError, match=r"devices=3, but environment started 2"):
        pair.run(partial(jobs.devices, 3))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("foreign", "nn.Parameter"),
        ("unfreeze", "1 parameter"),
        ("group", "1 group"),
        ("replace", "another SGD in its place"),
    ],
)
def test_parameters_deepspeed_cannot_know_are_refused(change, says):
    with pytest.raises(ConfigurationError, match=says):
        jobs.fit(jobs.Misowned(change), {"stage": 2}, 1, 0)


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.Muon, torch.optim.SparseAdam])
def test_optimizers_that_slices_would_mislead_are_refused(make):
    module = Closure(lambda parameters: make([p for p in parameters if p.dim() == 2]))
    with pytest.raises(UnsupportedCombinationError, match=f"deepspeed-flat.*Received: .*{make.__name__}"):
        jobs.fit(module, {"stage": 1}, 1, 0)


@pytest.mark.parametrize(("stage", "dtype"), [(1, torch.float64), (3, torch.complex64)])
def test_parameters_of_another_dtype_are_refused(stage, dtype):
    class Odd(Gan):
        def __init__(self):
            super().__init__()
            self.odd = torch.nn.Parameter(torch.ones(2, dtype=dtype))

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.1)]

    with pytest.raises(ConfigurationError, match=f"parameters of torch.float32.*odd of {dtype}"):
        jobs.fit(Odd(), {"stage": stage}, 1, 0)


def trained_beside_torch(make, data, options):
    """Train the network that `make` returns on DeepSpeed, and another one by hand; return both."""
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    network = make()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    for batch in data:
        optimizer.zero_grad()
        plain(batch).square().mean().backward()
        optimizer.step()
    module = jobs.Regression(network)
    trainer = Trainer("deepspeed", backend_options=options, max_epochs=1, enable_progress_bar=False)
    trainer.fit(module, data)
    return module.net, plain


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_that_are_not_contiguous_train_as_in_torch(stage):
    def network():
        made = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last))
        made[0].bias = torch.nn.Parameter(torch.arange(6.0).view(3, 2)[:, 0])
        return made

    data = [torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for ours, theirs in zip(*map(list_parameters, trained_beside_torch(network, data, {"stage": stage})), strict=True):
        torch.testing.assert_close(ours, theirs)


def list_parameters(network):
    return list(network.parameters())


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "parametrized"])
def test_weights_that_a_hook_computes_train_as_in_torch(norm):
    make = {
        "weight_norm": torch.nn.utils.weight_norm,
        "spectral_norm": torch.nn.utils.spectral_norm,
        "parametrized": torch.nn.utils.parametrizations.weight_norm,
    }[norm]

    def network():
        return torch.nn.Sequential(make(torch.nn.Linear(3, 8)), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    data = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for ours, theirs in zip(*map(list_parameters, trained_beside_torch(network, data, PARTITIONED)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reader", [copy.deepcopy, torch.nn.Module.state_dict], ids=["copy", "state_dict"])
def test_a_copy_of_what_is_partitioned_is_refused_or_whole(reader):
    class Copying(jobs.Regression):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            with self.trainer.backend.full_parameters(self.net):
                self.shapes = [tuple(p.shape) for p in copy.deepcopy(self.net).parameters()]
                self.saved = [tuple(p.shape) for p in self.net.state_dict().values()]
            reader(self.net)

    module = Copying(torch.nn.Linear(3, 1))
    trainer = Trainer("deepspeed", backend_options=PARTITIONED, max_epochs=1, enable_progress_bar=False)
    with pytest.raises(ProtocolError, match=r"a whole (net.)?weight to copy(.|\n)*full_parameters"):
        trainer.fit(module, [torch.ones(2, 3)])
    assert module.shapes == module.saved == [(1, 3), (1,)]
    assert [tuple(p.shape) for p in module.net.state_dict().values()] == [(1, 3), (1,)]
    assert [tuple(p.shape) for p in copy.deepcopy(module.net).parameters()] == [(1, 3), (1,)]


@pytest.mark.parametrize(("make", "told"), [(torch.optim.Adam, 1), (torch.optim.SGD, 0)])
def test_parameters_that_momentum_moves_are_told_once(caplog, make, told):
    class Parts(jobs.Regression):
        def training_step(self, batch, batch_idx):
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(self.net[batch_idx % 2](batch).square().mean())
            opt.step()

        def configure_optimizers(self):
            return make(self.net.parameters(), lr=0.05)

    module = Parts(torch.nn.ModuleList([torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)]))
    trainer = Trainer("deepspeed", backend_options={"stage": 2}, max_epochs=1, enable_progress_bar=False)
    trainer.fit(module, [torch.ones(2, 3)] * 4)
    assert caplog.text.count("none for net.0.weight, net.0.bias in this step; momentum moves them") == told


def test_what_deepspeed_itself_refuses_is_told_with_the_settings(pair):
    zero = {"stage": 3, "zero_hpz_partition_size": 3}  # for two processes
    with pytest.raises(ConfigurationError, match=r"settings that DeepSpeed can make.*zero_hpz_partition_size': 3"):
        pair.run(partial(jobs.misfit, {"config": {"zero_optimization": zero}}))


def test_unknown_key_of_zero_is_named():
    with pytest.raises(ConfigurationError, match="reduce_buckets_size"):
        jobs.fit(Gan(), {"config": {"zero_optimization": {"reduce_buckets_size": 8}}}, 1, 0)


def test_direct_calls_say_what_they_miss():
    class Direct(Gan):
        def training_step(self, batch, batch_idx):
            self.D(batch[0]).sum().backward()

    with pytest.raises(ProtocolError, match=r"partitioned step of DeepSpeed[\s\S]*self.manual_backward"):
        jobs.fit(Direct(), {}, 1, 0)


@pytest.mark.parametrize("options", [{"stage": 2}, {"stage": 3, "offload_optimizer": "cpu"}], ids=str)
def test_nothing_needs_a_compiler(options, tmp_path):
    hidden = {"PATH": "/nonexistent", "CXX": None, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    error, built = fresh(jobs.without_compiler, options, **hidden)
    assert error < 1e-6
    assert built == []


def test_what_is_missing_is_told(monkeypatch):
    backend = Trainer(backend="deepspeed").backend
    assert type(backend).available() is None
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    assert "export DS_ACCELERATOR=cuda, or cpu" in type(backend).available()
