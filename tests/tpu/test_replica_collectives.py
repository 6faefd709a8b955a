"""What two replicas say to each other through the module and the Trainer."""

from fresh import fresh
from test_replicas import REPLICAS, WORLD, in_replicas

from xtrain.testing.probes import communicate, expected_messages


def all_heard():
    found = in_replicas(lambda rank: communicate("tpu", "32-true", {}, WORLD, rank))
    return [found[rank] for rank in range(WORLD)]


def test_collectives_for_users():
    for rank, heard in enumerate(fresh(all_heard, **REPLICAS)):
        expected = expected_messages(rank, WORLD)
        assert heard == {name: list(value) if isinstance(value, tuple) else value for name, value in expected.items()}
