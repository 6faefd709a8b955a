"""Averages that start in backward: the same bits as without, and how many of them were of use."""

from functools import partial

import overlap_jobs
import pytest
import torch

from xtrain import ConfigurationError, Trainer
from xtrain.testing.ranks import Ranks


@pytest.fixture(scope="module")
def pair():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


# Three layers, a bucket each, in six batches of which the first only learns that backward is followed by a step.
# What changes after backward is thrown away and averaged late.
@pytest.mark.parametrize(
    ("case", "early", "thrown", "late"),
    [
        ("plain", 15, 0, 1),
        ("touched", 14, 1, 2),
        ("replaced", 14, 1, 2),
        ("removed", 14, 1, 2),
        ("unused", 15, 0, 1),
        ("twice", 9, 6, 3),  # that rank bets again only after the next step
        ("zeroed", 9, 6, 3),
        ("raises", 9, 6, 3),
        ("skips", 3, 3, 2),  # three steps: one to learn, one early, one where a rank had nothing to start
        ("unfinished", 12, 0, 1),
        ("hooked", 10, 3, 6),  # its bucket is given up after three
        ("sparse", 15, 3, 6),  # a fourth bucket, likewise
        ("sparse on one rank", 15, 3, 6),
    ],
)
def test_the_result_is_the_same(pair, case, early, thrown, late):
    (same, counts, parameters), (other_same, other_counts, others) = pair.run(
        partial(overlap_jobs.with_and_without, case, "32-true")
    )
    assert same
    assert other_same
    assert all(map(torch.equal, parameters, others))
    assert counts == other_counts == (early, thrown, late)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_precisions(pair, precision):
    for same, counts, _ in pair.run(partial(overlap_jobs.with_and_without, "plain", precision)):
        assert same
        assert counts == ({"bf16-true": 10}.get(precision, 15), 0, 1)


# Generator and discriminator fill two buckets of 50 bytes each. The generator's loss reaches the discriminator,
# whose buckets must not start then: these gradients are zeroed.
def test_each_optimizer_starts_in_its_own_backward_only(pair):
    for counts in pair.run(partial(overlap_jobs.gan, 50 / 2**20)):
        assert (counts.early, counts.thrown, counts.late) == (20, 0, 2)


def test_less_than_two_buckets_are_not_started_early(pair):
    for counts in pair.run(partial(overlap_jobs.gan, 25)):
        assert (counts.early, counts.thrown, counts.late) == (0, 0, 12)


def test_a_bucket_needs_a_size():
    with pytest.raises(ConfigurationError, match="bucket_mb above zero"):
        Trainer("cpu", backend_options={"overlap": True, "bucket_mb": 0})
