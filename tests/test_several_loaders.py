"""Several loaders at once: dicts, lists and nested ones, in training and in evaluation.

What comes out in each mode was read off Lightning's CombinedLoader (2.6.6) with the same loaders.
"""

from __future__ import annotations

import pytest
import torch
from small import Small, loader, rows, says, trained, trainer
from torch.utils.data import DataLoader

from xtrain import ConfigurationError
from xtrain.utilities import CombinedLoader


def numbers(*values):
    """A loader whose batches are these numbers."""
    return DataLoader([torch.tensor(float(v)) for v in values], batch_size=None)


class Keeping(Small):
    """Keeps the numbers of each batch, in the batch's structure."""

    def training_step(self, batch, batch_idx):
        self.seen.append(plain(batch))

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen.append((plain(batch), batch_idx, dataloader_idx))

    test_step = predict_step = validation_step


def plain(batch):
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [plain(value) for value in batch]
    return None if batch is None else batch.item()


def seen_by_training(loaders, **options):
    return trained(loaders, Keeping(), **options)[0].seen


def test_a_dict_trains_in_the_mode_of_lightning():
    loaders = {"photo": numbers(1, 2, 3), "painting": numbers(8, 9)}
    assert seen_by_training(loaders) == [
        {"photo": 1, "painting": 8},
        {"photo": 2, "painting": 9},
        {"photo": 3, "painting": 8},
    ]


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_or_tuple(kind):
    assert seen_by_training(kind([numbers(1, 2), numbers(8)])) == [[1, 8], [2, 8]]


def test_nested():
    loaders = {"a": [numbers(1), numbers(2)], "b": {"c": numbers(3, 4)}}
    assert seen_by_training(loaders) == [{"a": [1, 2], "b": {"c": 3}}, {"a": [1, 2], "b": {"c": 4}}]


def unsized(*values):
    return (torch.tensor(float(v)) for v in values)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("min_size", [[1, 8], [2, 9]]),
        ("max_size_cycle", [[1, 8], [2, 9], [3, 8]]),
        ("max_size", [[1, 8], [2, 9], [3, None]]),
        ("sequential", [1, 2, 3, 8, 9]),
    ],
)
@pytest.mark.parametrize("first", [numbers, unsized], ids=["sized", "unsized"])
def test_modes(mode, expected, first):
    combined = CombinedLoader([first(1, 2, 3), numbers(8, 9)], mode)
    assert seen_by_training(combined) == expected


def test_combined_loader_gives_its_indices():
    loaders = {"a": numbers(1, 2), "b": numbers(3)}
    assert [(plain(b), i, d) for b, i, d in CombinedLoader(loaders, "sequential")] == [(1, 0, 0), (2, 1, 0), (3, 0, 1)]
    assert [(plain(b), i, d) for b, i, d in CombinedLoader(loaders)] == [({"a": 1, "b": 3}, 0, 0)]
    assert [len(CombinedLoader(loaders, m)) for m in ("min_size", "max_size", "sequential")] == [1, 2, 3]


def test_is_last_batch_and_the_number_of_batches():
    class Last(Keeping):
        def training_step(self, batch, batch_idx):
            self.seen.append(self.trainer.is_last_batch)

    module, run = trained({"a": numbers(1, 2, 3), "b": numbers(4)}, Last(), limit_train_batches=2)
    assert module.seen == [False, True]
    assert run.num_training_batches == 2


def test_each_loader_is_shuffled_anew_when_it_begins_again():
    torch.manual_seed(3)
    short = DataLoader([torch.tensor(float(v)) for v in range(4)], batch_size=None, shuffle=True)
    seen = [batch[1] for batch in seen_by_training([numbers(*range(12)), short])]
    rounds = [seen[:4], seen[4:8], seen[8:]]
    assert all(sorted(r) == [0, 1, 2, 3] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1


@pytest.mark.parametrize("task", ["validate", "test", "predict"])
def test_evaluation_reads_a_dict_one_loader_after_the_other(task):
    module = Keeping()
    getattr(trainer(), task)(module, {"a": numbers(1, 2), "b": numbers(3)})
    assert module.seen == [(1, 0, 0), (2, 1, 0), (3, 0, 1)]


def test_evaluation_of_a_combined_loader():
    module = Keeping()
    trainer().validate(module, CombinedLoader({"a": numbers(1, 2), "b": numbers(3)}, "max_size_cycle"))
    assert module.seen == [({"a": 1, "b": 3}, 0, 0), ({"a": 2, "b": 3}, 1, 0)]


@pytest.mark.parametrize(
    "batches",
    [[rows(2)] * 3, [[rows(2), rows(2)]] * 3, [(rows(2), "text")] * 3, [{"x": rows(2)}] * 3, [rows(2).numpy()] * 3],
    ids=["tensors", "lists", "tuples", "dicts", "arrays"],
)
def test_a_list_of_batches_is_one_loader(batches):
    class Counting(Small):
        def training_step(self, batch, batch_idx):
            assert type(batch) is type(batches[0])
            self.seen.append(batch_idx)

    assert trained(batches, Counting())[0].seen == [0, 1, 2]


@pytest.mark.parametrize("loaders", [{"a": "text"}, {"a": numbers(1), "b": 3}, {"a": rows(2)}, {}])
def test_a_dict_of_no_loaders_is_refused(loaders):
    for run in (lambda: trained(loaders, Keeping()), lambda: trainer().validate(Keeping(), loaders)):
        with pytest.raises(ConfigurationError) as caught:
            run()
        says(caught.value, "a dict of loaders")


def test_an_empty_one_among_several_is_told():
    with pytest.raises(ConfigurationError) as caught:
        seen_by_training([loader(2), []])
    says(caught.value, "at least one batch")


def test_mode_is_checked():
    with pytest.raises(ConfigurationError) as caught:
        CombinedLoader([loader()], "longest")
    says(caught.value, "max_size_cycle", "'longest'")
