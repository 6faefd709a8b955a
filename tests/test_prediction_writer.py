"""Predictions that are written as they are made: which rows they are of, and that nothing else is kept."""

from __future__ import annotations

import pytest
import torch
from small import Small, loader, rows, says, trainer
from torch.utils.data import DataLoader, IterableDataset

from xtrain import ConfigurationError
from xtrain.callbacks import BasePredictionWriter


class Written(BasePredictionWriter):
    def __init__(self, interval):
        super().__init__(interval)
        self.batches, self.epochs = [], []

    def write_on_batch_end(self, trainer, module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        self.batches.append((dataloader_idx, batch_idx, batch_indices, prediction))

    def write_on_epoch_end(self, trainer, module, predictions, batch_indices):
        self.epochs.append((predictions, batch_indices))


class Predicts(Small):
    def predict_step(self, batch, batch_idx):
        return batch * 2


def predict(source, interval="batch_and_epoch", **options):
    writer = Written(interval)
    return trainer(callbacks=writer).predict(Predicts(), source, **options), writer


def test_every_row_is_written_under_its_index():
    data = rows(7)
    shuffled = DataLoader(data, batch_size=2, shuffle=True)  # type: ignore[arg-type]
    returned, writer = predict(shuffled)
    found = torch.zeros(7, 3)
    for _, _, indices, prediction in writer.batches:
        found[indices] = prediction
    assert torch.equal(found, data * 2)
    ((predictions, (indices,)),) = writer.epochs
    assert [len(part) for part in indices] == [2, 2, 2, 1]
    assert torch.equal(torch.cat(predictions), torch.cat(returned))


def test_several_loaders_and_what_has_no_indices():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(rows(2))

    _, writer = predict([loader(1), DataLoader(Stream(), batch_size=2)])
    assert [entry[:3] for entry in writer.batches] == [(0, 0, [0, 1]), (1, 0, None)]
    assert writer.epochs[0][1] == [[[0, 1]], None]


def test_loader_processes_draw_ahead_and_change_nothing():
    _, writer = predict(DataLoader(rows(6), batch_size=2, num_workers=1))  # type: ignore[arg-type]
    assert [indices for _, _, indices, _ in writer.batches] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(("interval", "batches", "epochs"), [("batch", 4, 0), ("epoch", 0, 1)])
def test_nothing_is_returned_if_it_is_not_wanted(interval, batches, epochs):
    returned, writer = predict(loader(), interval, return_predictions=False)
    assert returned is None
    assert (len(writer.batches), len(writer.epochs)) == (batches, epochs)
    if epochs:
        assert len(writer.epochs[0][0]) == 4


def test_an_interval_that_means_nothing():
    with pytest.raises(ConfigurationError) as caught:
        Written("step")
    says(caught.value, "'batch'")
