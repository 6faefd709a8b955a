"""Two processes that stay: what is averaged, compared at the start, and said between them."""

from functools import partial

import pytest
import rank_jobs
import torch
from torch.utils.data import DistributedSampler
from xtrain_backends.eager.process_group import finish

from xtrain import ConfigurationError, ProtocolError
from xtrain.testing.ranks import Ranks


@pytest.fixture(scope="module")
def pair():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def test_the_environment_is_joined(pair):
    assert pair.run(rank_jobs.joined) == [(0, 2), (None, 2)]


def test_what_one_rank_sends_to_another_may_come_late(pair):
    assert pair.run(rank_jobs.sent_late) == [[2.0, 2.0]] * 2


def test_a_collective_that_ends_in_the_last_moment_is_judged_by_its_own_end():
    finish(rank_jobs.EndsLate(), torch.device("cpu"), "reduce")
    with pytest.raises(RuntimeError, match=r"peer is gone \(it was to reduce\)"):
        finish(rank_jobs.EndsLate(RuntimeError("peer is gone")), torch.device("cpu"), "reduce")


# The ranks hold 1 and 2: their mean is 1.5, or half of what one of them has.
@pytest.mark.parametrize(
    ("case", "first"),
    [
        ("everywhere", torch.full((3,), 1.5)),
        ("missing on one rank", torch.full((3,), 1.0)),
        ("large", torch.full((300, 400), 1.5)),
        ("strided", torch.full((400, 300), 1.5)),
        ("sparse", torch.tensor([[0.5], [1.0], [0.0], [1.5]]).expand(4, 2)),
        ("sparse on one rank", torch.tensor([[0.5], [0.0], [0.0], [0.5]]).expand(4, 2)),
        ("sparse beside dense", torch.tensor([[1.5], [1.0], [1.0], [1.5]]).expand(4, 2)),
    ],
)
def test_gradients_are_averaged(pair, case, first):
    for gradients in pair.run(partial(rank_jobs.averaged, case)):
        assert torch.equal(gradients[0], first.double())
        assert [g.tolist() for g in gradients[1:]] == [[1.5] * 3] * 2


def test_what_no_rank_has_stays_none(pair):
    for gradients in pair.run(partial(rank_jobs.averaged, "missing everywhere")):
        assert gradients[1] is None


def test_ranks_that_step_different_optimizers_are_told(pair):
    with pytest.raises(ProtocolError, match=r"rank 0 is to average optimizer 0; rank 1 is to average optimizer 1"):
        pair.run(rank_jobs.different_optimizers)


@pytest.mark.parametrize(
    ("what", "first_difference"),
    [
        ("shape", r"'parameter G.last.weight: shape \(4, 6\).*' on rank 0, but '.*shape \(5, 6\).*' on rank 1"),
        ("count", "'parameter G.first.weight.*' on rank 0, but 'parameter extra"),
        ("frozen", "'parameter D.last.bias.*frozen' on rank 1"),
        ("value", "another 'D.last.bias' on rank 1 than on rank 0"),
        ("class", "'optimizer 1: Adam' on rank 0, but 'optimizer 1: SGD' on rank 1"),
        ("order", "group 0: D.first.weight.* on rank 0, but .*group 0: D.last.bias"),
        ("fewer", "'2 optimizers' on rank 0, but '1 optimizers' on rank 1"),
    ],
)
def test_ranks_that_train_different_things_are_refused(pair, what, first_difference):
    with pytest.raises(ConfigurationError, match=first_difference) as caught:
        pair.run(partial(rank_jobs.odd, what, {"broadcast_start": False}))
    assert "Fix: " in str(caught.value)


def test_a_different_start_is_that_of_rank_0(pair):
    (bias, _), (other, _) = pair.run(partial(rank_jobs.odd, "value", {}))
    (expected, _), _ = pair.run(partial(rank_jobs.odd, "nothing", {}))
    assert torch.equal(bias, expected)
    assert torch.equal(other, expected)


def test_buffers_start_as_those_of_rank_0(pair):
    for _, mean in pair.run(partial(rank_jobs.odd, "buffer", {})):
        assert mean.tolist() == [0.0, 0.0, 0.0]


def test_an_overflow_on_one_rank_skips_the_step_on_all(pair):
    first, second = pair.run(rank_jobs.overflow)
    assert first == second
    assert first[0] == [[3, 1], [4, 0]]


def test_a_raw_step_is_still_refused_after_a_closure_that_failed(pair):
    with pytest.raises(ProtocolError, match=r"a step of the raw optimizer 0 \(SGD\).*averag"):
        pair.run(rank_jobs.raw_step_after_failed_closure)


@pytest.mark.parametrize(("counts", "drop", "finish"), [((5, 3), 3, 5), ((2, 4), 2, 4), ((3, 3), 3, 3)])
def test_ranks_that_do_not_know_their_lengths_end_together(pair, counts, drop, finish):
    for how, length in (("drop", drop), ("finish", finish)):
        for count, epochs in zip(counts, pair.run(partial(rank_jobs.uneven, counts, how)), strict=True):
            # who has no more repeats the last batch
            expected = [(min(index, count - 1), index == length - 1) for index in range(length)]
            assert epochs == [expected, expected]


@pytest.mark.parametrize("how", ["drop", "finish"])
@pytest.mark.parametrize("counts", [(0, 2), (2, 0)])
def test_a_rank_without_any_batch_is_told_on_all_ranks(pair, counts, how):
    says = "a batch on every rank" if how == "finish" else "at least one batch from the training loader"
    with pytest.raises(ConfigurationError, match=says):
        pair.run(partial(rank_jobs.uneven, counts, how))


@pytest.mark.parametrize(("kind", "seed"), [("made distributed", 5), ("distributed already", 9)])
def test_the_order_of_an_epoch_is_that_of_torch(pair, kind, seed):
    for rank, epochs in enumerate(pair.run(partial(rank_jobs.orders, kind))):
        sampler = DistributedSampler(range(22), 2, rank, seed=seed)
        expected = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            order = list(sampler)
            expected.append([order[i : i + 4] for i in range(0, len(order), 4)])
        assert epochs == expected
        assert epochs[0] != epochs[1]


def test_neighbours_in_a_stream_go_to_different_ranks(pair):
    assert pair.run(rank_jobs.stream) == [[[0, 2], [4, 6], [8, 10]], [[1, 3], [5, 7], [9]]]


def test_whole_numbers_are_reduced(pair):
    assert pair.run(rank_jobs.reduced) == [[[1, 2], [0.5, 1.0], [1, 1], [0, 1]]] * 2


def test_each_rank_draws_its_own_noise_in_a_run(pair):
    first, second = pair.run(rank_jobs.drawn)
    noise = [number for runs, _ in (first, second) for number, _ in runs]
    assert len(set(noise)) == 4, "two ranks in two runs"
    assert first[0][0][1] == second[0][0][1], "a choice by Python's generator is the same on all ranks"
    assert first[1] == second[1], "outside of runs all ranks draw the same"
    assert pair.run(rank_jobs.drawn) == [first, second], "the seed decides"


def test_a_line_search_sees_the_mean_loss(pair):
    by_hand = rank_jobs.LineSearch()
    optimizer = by_hand.configure_optimizers()

    def closure():
        optimizer.zero_grad()
        loss = by_hand.loss(rank_jobs.ROWS)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    for weight in pair.run(rank_jobs.line_search):
        torch.testing.assert_close(weight, by_hand.weight.detach(), atol=1e-4, rtol=0)
