"""The distillation of digits in shards on two processes: the parameters of a plain loop on whole batches."""

from functools import partial

import distilled
import pytest

from xtrain.testing.ranks import Ranks


@pytest.fixture(scope="module")
def pair():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("reduce", ["finalize", "backward"])
def test_same_as_by_hand(pair, reduce):
    outcomes = pair.run(partial(distilled.by_trainer, "fsdp", {"reduce": reduce}), 120.0)
    distilled.assert_same(outcomes[0], distilled.by_hand(), 1e-5)
    assert all(value.equal(outcomes[1][name]) for name, value in outcomes[0].items())
