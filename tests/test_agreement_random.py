"""Two ranks with random steps, loaders, metrics and ends: both as by hand in plain PyTorch, or an error on both."""

import copy
from functools import partial

import agreement_jobs as jobs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xtrain.testing.ranks import Ranks

WAIT = 30.0

STEP = st.fixed_dictionaries(
    {
        "optimizers": st.sampled_from([[0, 1], [0], [1], [], [1, 0]]),
        "names": st.sampled_from([[], ["a"], ["a", "b"], ["b", "a"]]),
        "gathers": st.booleans(),
        "stops": st.sampled_from([False, False, False, True]),
    }
)
PLAN = st.fixed_dictionaries({"steps": st.lists(STEP, min_size=2, max_size=4), "sized": st.booleans()})


@st.composite
def plans(draw):
    """Two plans: the same one, or one that differs somewhere, in a step or in the number of batches."""
    ours = draw(PLAN)
    theirs = copy.deepcopy(ours)
    what = draw(st.sampled_from(["nothing", "step", "order", "length"]))
    where = draw(st.integers(0, len(ours["steps"]) - 1))
    if what == "step":
        theirs["steps"][where] = draw(STEP)
    if what == "order":
        theirs["steps"][where]["names"] = ours["steps"][where]["names"][::-1]
    if what == "length":
        theirs["steps"].append(draw(STEP))
    return [ours, theirs] if draw(st.booleans()) else [theirs, ours]


@pytest.fixture(scope="module")
def processes():
    kept = [Ranks(2)]
    yield kept
    for ranks in kept:
        ranks.close()


def in_step(processes):
    """Return two processes that make the same calls; new ones after an error that left them apart."""
    same = {"steps": [{"optimizers": [0], "names": [], "gathers": False, "stops": False}] * 2, "sized": True}
    if any(isinstance(end, str) for end in processes[-1].run(partial(jobs.planned, [same, same]), WAIT)):
        processes.append(Ranks(2))
    return processes[-1]


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(both=plans())
def test_ranks_do_the_same_as_by_hand_or_are_told(processes, both):
    expected = jobs.by_hand(both)
    ends = in_step(processes).run(partial(jobs.planned, both), WAIT)
    if expected is None:
        for end in ends:
            assert isinstance(end, str), f"ranks that differ were not told: {both}"
            assert "Expected " in end
            assert "Received: " in end
            assert "Fix:  " in end
        return
    for end in ends:
        assert not isinstance(end, str), end
        found, metrics, steps = end
        assert steps == expected[2]
        assert found == pytest.approx(expected[0], abs=1e-6)
        assert metrics == pytest.approx(expected[1], abs=1e-5)
