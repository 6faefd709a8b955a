"""Which rank reads what: parts of loaders of every kind, and lengths that all ranks agree on."""

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
)

from xtrain.collectives import Collectives
from xtrain.data.combined import combined
from xtrain.data.sharding import common_size, repeat_last, set_epoch, shard_loader
from xtrain.errors import ConfigurationError


class Rank(Collectives):
    """One of `world_size` ranks whose batch counts are `sizes`."""

    def __init__(self, rank, world_size=2, sizes=()):
        self.rank, self.world_size, self.sizes = rank, world_size, sizes

    def all_gather(self, tensor):
        return torch.tensor(self.sizes).reshape(-1, 1)


class Count(IterableDataset):
    def __iter__(self):
        return iter(range(12))


class Sharded(Count):
    sharded = True


class NumbersOnly(DataLoader):
    def __init__(self, numbers):
        super().__init__(numbers)


def parts(loader, world_size=2, epoch=0):
    found = []
    for rank in range(world_size):
        part = shard_loader(loader, Rank(rank, world_size))
        set_epoch(part, epoch)
        found.append([batch.tolist() for batch in part])
    return found


def flat(part):
    return [item for batch in part for item in batch]


def test_parts_are_disjoint_complete_and_in_order():
    assert parts(DataLoader(range(8), batch_size=2)) == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]


def test_parts_are_equally_long():
    first, second = parts(DataLoader(range(7), batch_size=2))
    assert len(flat(first)) == len(flat(second)) == 4
    assert set(flat(first)) | set(flat(second)) == set(range(7))


def test_shuffled_parts_belong_to_one_order_that_changes_with_the_epoch():
    orders = []
    for epoch in range(2):
        first, second = parts(DataLoader(range(20), batch_size=5, shuffle=True), epoch=epoch)
        assert sorted(flat(first) + flat(second)) == list(range(20))
        orders.append(first)
    assert orders[0] != orders[1]
    assert orders[0] == parts(DataLoader(range(20), batch_size=5, shuffle=True), epoch=0)[0]


def test_custom_sampler_is_split_in_its_own_order():
    loader = DataLoader(range(8), batch_size=2, sampler=[7, 6, 5, 4, 3, 2, 1, 0])
    assert parts(loader) == [[[7, 5], [3, 1]], [[6, 4], [2, 0]]]


def test_custom_random_sampler_draws_the_same_on_every_rank():
    sampler = WeightedRandomSampler([1.0] * 30, 30)
    loader = DataLoader(range(30), batch_size=15, sampler=sampler)
    halves = parts(loader, epoch=3)
    torch.manual_seed(3)
    order = list(sampler)
    assert [flat(half) for half in halves] == [order[0::2], order[1::2]]


def test_sampling_leaves_the_global_generator_alone():
    loader = shard_loader(DataLoader(range(30), sampler=WeightedRandomSampler([1.0] * 30, 30)), Rank(0))
    state = torch.get_rng_state()
    list(loader.sampler)
    assert torch.equal(torch.get_rng_state(), state)


def test_partial_random_sampler_keeps_its_length():
    loader = DataLoader(range(100), batch_size=5, sampler=RandomSampler(range(100), num_samples=20))
    assert [len(flat(part)) for part in parts(loader)] == [10, 10]


def test_whole_batches_of_a_batch_sampler_go_to_ranks():
    class Pairs(BatchSampler):
        def __iter__(self):
            return iter([[0, 1], [2, 3], [4, 5], [6, 7]])

        def __len__(self):
            return 4

    loader = DataLoader(range(8), batch_sampler=Pairs(range(8), 2, False))
    assert parts(loader) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_iterable_dataset_is_split_over_ranks_and_workers():
    assert parts(DataLoader(Count(), batch_size=3)) == [[[0, 2, 4], [6, 8, 10]], [[1, 3, 5], [7, 9, 11]]]
    # Each worker makes batches of its own, and the loader takes one from each in turn.
    workers = parts(DataLoader(Count(), batch_size=3, num_workers=2))
    assert workers == [[[0, 4, 8], [2, 6, 10]], [[1, 5, 9], [3, 7, 11]]]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_read_an_iterable_side_by_side(world_size, num_workers):
    """After any number of steps the ranks together have read the beginning of the stream, without a gap."""
    ranks = parts(DataLoader(Count(), batch_size=1, num_workers=num_workers), world_size)
    assert [item for step in zip(*map(flat, ranks), strict=True) for item in step] == list(range(12))


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(range(8), sampler=DistributedSampler(range(8), 2, 0)),
        DataLoader(Sharded(), batch_size=2),
        [torch.zeros(1)],
    ],
    ids=["distributed sampler", "sharded dataset", "list"],
)
def test_what_is_sharded_or_no_loader_is_left_alone(loader):
    assert shard_loader(loader, Rank(1)) is loader


def test_one_rank_reads_everything():
    loader = DataLoader(range(8))
    assert shard_loader(loader, Collectives()) is loader


def test_settings_of_the_loader_are_kept():
    def collate(items):
        return torch.tensor(items) * 10

    generator = torch.Generator()
    loader = DataLoader(range(10), batch_size=2, collate_fn=collate, drop_last=True, generator=generator)
    part = shard_loader(loader, Rank(0))
    assert part.generator is generator
    assert [batch.tolist() for batch in part] == [[0, 20], [40, 60]]


def test_loader_that_cannot_be_made_anew_is_named():
    with pytest.raises(ConfigurationError, match=r"NumbersOnly.*\n?.*DistributedSampler"):
        shard_loader(NumbersOnly(range(4)), Rank(0))


def test_ranks_agree_on_the_number_of_batches():
    assert common_size(5, Rank(0, sizes=[5, 3]), "drop") == 3
    assert common_size(5, Rank(0, sizes=[5, 3]), "finish") == 5
    assert common_size(None, Rank(0, sizes=[-1, 3]), "drop") is None
    assert common_size(7, Collectives(), "drop") == 7


def test_last_batch_is_repeated():
    batches = repeat_last([1, 2], 2)
    assert [next(batches) for _ in range(4)] == [1, 2, 2, 2]
    assert list(repeat_last([], 0)) == []


def test_each_of_several_loaders_is_split():
    loaders = {"a": DataLoader(range(4), batch_size=1), "b": DataLoader(range(10, 18), batch_size=2, shuffle=True)}
    read = []
    for rank in range(2):
        part = shard_loader(combined(loaders), Rank(rank))
        set_epoch(part, 1)
        assert len(part) == 2
        read.append([(batch["a"].tolist(), batch["b"].tolist()) for batch in part])
    assert sorted(a for part in read for first, _ in part for a in first) == [0, 1, 2, 3]
    assert sorted(b for part in read for _, second in part for b in second) == list(range(10, 18))
    set_epoch(part, 2)
    assert [batch["b"].tolist() for batch in part] != [second for _, second in read[1]]  # the epoch reached the sampler
