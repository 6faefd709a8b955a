"""Two ranks of which one does something else: both get the same, or both an error that names the difference."""

import re
from functools import partial

import agreement_jobs as jobs
import pytest
import torch

from xtrain.testing.ranks import Ranks

WAIT = 30.0
"""Seconds in which both ranks must have answered."""


@pytest.fixture(scope="module")
def processes():
    kept = [Ranks(2)]
    yield kept
    for ranks in kept:
        ranks.close()


@pytest.fixture
def pair(processes):
    """Two processes; new ones after a test that left their calls out of step."""
    ends = processes[-1].run(partial(jobs.apart, None, {"max_epochs": 1}))  # new ones take long to start
    if any(isinstance(end, str) for end in ends):
        processes.append(Ranks(2))
    return processes[-1]


# ---------------------------------------------------------------- one rank does something else

ASIDE = r"rank 0 is to average the gradients of optimizer 0 .*, in training step 2 of epoch 0; rank 1 is to "
APART = {
    "skip": (jobs.skip, ASIDE + "average the gradients of optimizer 0 .*, in training step 3 of epoch 0"),
    "one optimizer": (
        jobs.one_optimizer,
        r"gradients of optimizer 1 .*step 2 of epoch 0; rank 1 .*optimizer 0 .*step 3",
    ),
    "other order": (jobs.other_order, ASIDE + "average the gradients of optimizer 1"),
    "gather": (jobs.gather_alone, ASIDE + r"gather a tensor of shape \(3,\), float32"),
    "shape": (jobs.gather_other_shape, r"rank 0 is to gather a tensor of shape \(3,\).*; rank 1 .* shape \(4,\)"),
    "broadcast": (jobs.broadcast_alone, ASIDE + "broadcast an object of rank 0"),
    "barrier": (jobs.wait_alone, ASIDE + "wait for all ranks"),
    "step metric": (jobs.log_step_alone, r"rank 1 is to reduce what was logged in steps.*\[mine\]"),
    "epoch metric": (jobs.log_epoch_alone, r"Received: 'mine' from rank 1, not from rank 0"),
    "name": (jobs.log_other_name, r"'only0' from rank 0, not from rank 1"),
    "reduction": (jobs.log_other_reduction, r"one reduction of 'ours'. Received: reduce_fx='min' on rank 1"),
    "parameter": (jobs.write_by_hand, r"another 'second.bias' on rank 1 than on rank 0"),
}


@pytest.mark.parametrize("name", APART)
def test_what_one_rank_does_apart_is_told_on_both(pair, name):
    odd, says = APART[name]
    first, second = pair.run(partial(jobs.apart, odd, {}), WAIT)
    for said in (first, second):
        assert isinstance(said, str), said
        assert said.startswith("ProtocolError: Expected "), said
        assert re.search(says, said, re.DOTALL), said
        assert "Fix:  " in said


def test_a_step_metric_of_one_rank_is_told_at_the_end_of_an_epoch(pair):
    for said in pair.run(partial(jobs.log_apart, jobs.log_alone_before_a_log_point), WAIT):
        assert "'mine (step)' from rank 1, not from rank 0" in said, said


def test_an_epoch_that_one_rank_ends_by_its_hook_is_told(pair):
    for said in pair.run(jobs.hook_of_one_rank, WAIT):
        assert re.search(ASIDE + r"reduce what was logged .* which on_train_batch_start ended by -1", said), said


def test_a_metric_object_of_one_rank_is_told(pair):
    for said in pair.run(jobs.object_of_one_rank, WAIT):
        assert "'object' from rank 1, not from rank 0" in said


def test_an_error_of_one_rank_is_told_on_the_other_within_seconds(pair):
    first, second = pair.run(partial(jobs.apart, jobs.raise_alone, {}), WAIT)
    assert first.startswith("RankFailedError: Rank 1 failed first: XTrainError: on purpose")
    assert second == "XTrainError: on purpose"


def test_a_length_that_one_rank_makes_up_is_told(pair):
    first, second = pair.run(jobs.short_loader, WAIT)
    assert "Expected 10 batches, as len(loader) says. Received: 2 on this rank" in second
    assert "Rank 1 failed first: ConfigurationError: Expected 10 batches" in first


def test_replicas_may_differ_where_that_is_said(pair):
    first, second = pair.run(partial(jobs.apart, jobs.write_by_hand, {"check_replicas": "off"}), WAIT)
    assert first != second


# ---------------------------------------------------------------- an end that one rank asks for


@pytest.mark.parametrize(
    ("where", "steps"), [("before", 3), ("after", 3), ("validation", 3), ("epoch", 6)], ids=lambda value: str(value)
)
def test_an_end_that_one_rank_asks_for_is_an_end_for_all(pair, where, steps):
    # After the third step there is a validation, where the ranks hear of what was asked before.
    first, second = pair.run(partial(jobs.asked, where), WAIT)
    assert first == second
    assert first[:2] == (steps, True)


def test_an_end_of_a_stream_that_one_rank_asks_for(pair):
    assert pair.run(jobs.endless, WAIT) == [3, 3]


# ---------------------------------------------------------------- what ranks share


def test_a_schedule_follows_the_mean_of_the_ranks(pair):
    (rate, seen, parameters, local), (other_rate, others, other_parameters, other_local) = pair.run(jobs.plateau, WAIT)
    assert (rate, parameters) == (other_rate, other_parameters)
    assert rate < 0.1, "the schedule did something"
    assert local != other_local, "what is not synced stays each rank's own"
    assert seen[0][1] is None, "before the first log point there is nothing to see"
    for (own, _), (theirs, _), (_, mean), (_, same) in zip(seen, others, seen[1:], others[1:], strict=False):
        assert mean == same == pytest.approx((own + theirs) / 2)


def test_automatic_schedules_follow_the_mean_of_this_step(pair):
    first, second = pair.run(jobs.monitored, WAIT)
    assert first == second
    assert first[0] < 0.5


def test_metrics_meet_their_namesakes(pair):
    expected = {
        f"{name}{level}": value for name, value in (("a", 1.0), ("b", 100.0)) for level in ("", "_step", "_epoch")
    }
    assert pair.run(jobs.orders, WAIT) == [expected, expected]


def test_buffers_that_a_forward_moves_are_those_of_rank_0(pair):
    (code, mean), (other_code, other_mean) = pair.run(jobs.codebook, WAIT)
    assert code == other_code != [0.0] * 3
    assert mean != other_mean, "batch statistics are each rank's own"


@pytest.mark.parametrize(("count", "batch_size"), [(5, 1), (5, 2), (7, 3), (1, 1), (8, 2)])
def test_an_evaluation_reads_each_sample_once_and_in_order(pair, count, batch_size):
    (mean, first), (other_mean, second) = pair.run(partial(jobs.evaluated, count, batch_size), WAIT)
    assert first + second == list(range(count))
    assert mean == other_mean == pytest.approx(torch.arange(count).float().mean().item())
