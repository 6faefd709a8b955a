"""Recipes of several optimizers on two processes: parameters and norms of the plain loop on the whole batch."""

from functools import partial

import pytest
import torch
from recipes import RECIPES, Methods, by_hand, by_xtrain

from xtrain.testing.ranks import Ranks


@pytest.fixture(scope="module")
def pair():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def same_as_by_hand(ranks, make, options):
    outcomes = ranks.run(partial(by_xtrain, make, options), 60.0)
    expected, norms = by_hand(make)
    for parameters, _ in outcomes:
        assert parameters.keys() == expected.keys()
        assert all(torch.equal(parameters[name], outcomes[0][0][name]) for name in expected)
    for name, value in expected.items():
        torch.testing.assert_close(outcomes[0][0][name], value, atol=5e-6, rtol=1e-5)
    assert outcomes[0][1] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shard", ["layers", "children"])
def test_same_as_by_hand(pair, recipe, shard):
    same_as_by_hand(pair, RECIPES[recipe], {"shard": shard})


def test_methods_beside_forward(pair):
    same_as_by_hand(pair, Methods, {"methods": ["a.encode"]})
