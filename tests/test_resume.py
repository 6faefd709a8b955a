"""A run that goes on is the run that was never stopped: parameters bit by bit, over three generations."""

from __future__ import annotations

import csv
import random
from functools import partial

import metric_jobs
import numpy as np
import pytest
import torch
from small import rows
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from xtrain import CheckpointError, LightningModule, ModelCheckpoint, Trainer, seed_everything
from xtrain.testing.ranks import Ranks


class Noisy(Dataset):
    """Rows with random numbers from all three generators added, in the process that reads them."""

    def __len__(self):
        return 26

    def __getitem__(self, index):
        noise = 0.1 * torch.randn(3) + 0.01 * random.random() + 0.01 * np.random.rand()
        return rows(26)[index] + noise.float()


class Pair(LightningModule):
    """Two optimizers, dropout, tied weights, batch norm, schedules, accumulation; notes what it saw."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.a = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))
        self.b = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.b.weight
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch.sum().item()))
        first, second = self.optimizers()
        loss = (self.tied(self.b(self.a(batch))) - 1).square().mean()
        first.zero_grad()
        self.manual_backward(loss, retain_graph=True)
        self.clip_gradients(first, 1.0)
        first.step()
        if batch_idx % 3 == 2:  # accumulates over three batches; what is left over goes into the next epoch
            second.step()
            second.zero_grad()
        self.lr_schedulers()[0].step()
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)

    def on_train_epoch_end(self):
        self.lr_schedulers()[1].step()

    def validation_step(self, batch, batch_idx):
        self.log("val", self.a(batch).square().mean() + 0 * torch.rand(()))

    def configure_optimizers(self):
        groups = [{"params": self.a[0].parameters(), "lr": 0.02}, {"params": self.a[1:].parameters()}]
        first = torch.optim.Adam(groups, lr=0.01)
        second = torch.optim.SGD(self.b.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        schedulers = torch.optim.lr_scheduler.CosineAnnealingLR(first, 30), torch.optim.lr_scheduler.StepLR(second, 1)
        return [first, second], list(schedulers)


def fit(folder, max_steps, ckpt_path=None, module=None, **options):
    seed_everything(4)
    np.random.seed(4)
    module = module or Pair()
    saver = ModelCheckpoint(folder / "c", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(
        max_steps=max_steps, callbacks=[saver], enable_progress_bar=False, log_every_n_steps=3,
        num_sanity_val_steps=0, default_root_dir=folder, **{"logger": True, **options},
    )  # fmt: skip
    trainer.fit(module, DataLoader(Noisy(), batch_size=4, shuffle=True), DataLoader(rows(4), 2), ckpt_path=ckpt_path)
    return module, trainer


@pytest.fixture(autouse=True)
def _seed_of_these_tests_only(monkeypatch):
    monkeypatch.setenv("XTRAIN_SEED", "0")  # which seed_everything sets, and which is put back


def same(ours, theirs):
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def logged(folder):
    """The rows of the CSV file; columns may stand in another order."""
    with (folder / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true"])
def test_three_generations_are_one_run(tmp_path, precision):
    """Stopped in the middle of an epoch, exactly at its end, and in the middle of the third: seven batches each."""
    options = {"precision": precision}
    if precision == "16-mixed":
        options["scaler_kwargs"] = {"init_scale": 64.0, "growth_interval": 4}
    whole, reference = fit(tmp_path / "whole", 18, **options)
    seen = []
    for stop in (3, 7, 9, 18):
        part, trainer = fit(tmp_path / "parts", stop, "last", **options)
        seen += part.seen
    same(part, whole)
    assert seen == whole.seen
    assert [o.step_count for o in trainer.life.optimizers] == [o.step_count for o in reference.life.optimizers]
    assert (trainer.current_epoch, trainer.global_step) == (reference.current_epoch, reference.global_step)
    for ours, theirs in zip(trainer.life.optimizers, reference.life.optimizers, strict=True):
        assert [g["lr"] for g in ours.param_groups] == [g["lr"] for g in theirs.param_groups]
    assert trainer.callback_metrics == reference.callback_metrics
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")


def seen_in(folder, loader, *stops):
    """What several runs saw that went on where the one before was stopped."""
    seen = []
    for stop in stops:
        seed_everything(4)
        np.random.seed(4)
        saver, module = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1), Pair()
        trainer = Trainer(max_steps=stop, callbacks=[saver], enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(module, loader(), ckpt_path="last")
        seen += module.seen
    return seen


def test_random_numbers_of_loader_workers(tmp_path, caplog):
    """The same after the end of an epoch; in the middle of one it is told that they are others until its end."""

    def loader():
        return DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=2)

    whole = seen_in(tmp_path / "whole", loader, 14)
    assert seen_in(tmp_path / "end", loader, 7, 14) == whole
    assert "loader workers" not in caplog.text
    inside = seen_in(tmp_path / "inside", loader, 3, 14)
    assert "after 3 batches of an epoch" in caplog.text
    assert "begin anew for the rest of this epoch" in caplog.text
    same_ones = [ours == theirs for ours, theirs in zip(inside, whole, strict=True)]
    assert same_ones == [True] * 3 + [False] * 4 + [True] * 7
    plain = seen_in(tmp_path / "plain", lambda: DataLoader(rows(26), 4, shuffle=True, num_workers=2), 10)
    assert seen_in(tmp_path / "skip", lambda: DataLoader(rows(26), 4, shuffle=True, num_workers=2), 3, 10) == plain


class Stream(IterableDataset):
    """Numbers with noise, and where it is; says so, and counts what it had to read."""

    read = 0

    def __init__(self):
        self.at, self.generator = 0, torch.Generator().manual_seed(1)

    def __iter__(self):
        self.at %= 14  # a loader with a length is not read beyond it
        while self.at < 14:
            self.at, Stream.read = self.at + 1, Stream.read + 1
            yield torch.randn(3, generator=self.generator) + torch.randn(3)

    def state_dict(self):
        return {"at": self.at, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.at = state["at"]
        self.generator.set_state(state["generator"])


class Batches:
    """A loader with a length and a position of its own."""

    def __init__(self):
        self.stream = Stream()

    def __len__(self):
        return 7

    def __iter__(self):
        rest = iter(self.stream)
        for first in rest:
            yield torch.stack([first, next(rest)])

    def state_dict(self):
        return self.stream.state_dict()

    def load_state_dict(self, state):
        self.stream.load_state_dict(state)


@pytest.mark.parametrize("loader", [lambda: DataLoader(Stream(), 2), Batches], ids=["dataset", "loader"])
def test_what_keeps_its_own_position_is_asked_for_it(tmp_path, monkeypatch, loader):
    monkeypatch.setattr(Stream, "read", 0)
    whole, count = seen_in(tmp_path / "whole", loader, 12), Stream.read
    assert seen_in(tmp_path / "parts", loader, 3, 7, 9, 12) == whole
    assert Stream.read <= 2 * count + 3 * 2  # nothing is read again but what a run read ahead


def test_a_dataset_that_keeps_its_position_in_workers_is_read_from_its_beginning(tmp_path):
    def loader():
        return DataLoader(Stream(), 2, num_workers=1)

    whole = seen_in(tmp_path / "whole", loader, 7)
    assert seen_in(tmp_path / "parts", loader, 3, 7) == whole


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_metrics_of_half_an_epoch_go_on_with_another_number_of_processes(before, after, tmp_path):
    path = str(tmp_path / "half.ckpt")
    for count, options in ((before, {"stop": 6 // before}), (after, {"go_on": True})):
        ranks = Ranks(count)
        try:
            results = ranks.run(partial(metric_jobs.run, path, **options))
        finally:
            ranks.close()
    for values, seen, _ in results:
        assert values == {"own": 78.0, "mean": 6.5, "largest": 12.0}
        assert seen == [float(n) for n in range(1, 13)]


def test_a_metric_whose_ranks_cannot_be_reduced_is_refused_on_another_number_of_processes(tmp_path):
    path = str(tmp_path / "half.ckpt")
    ranks = Ranks(2)
    try:
        ranks.run(partial(metric_jobs.run, path, stop=3, unreduced=True))
    finally:
        ranks.close()
    with pytest.raises(CheckpointError, match=r"a reduction for 'last' of CatMetric 'all'"):
        metric_jobs.run(path, go_on=True, unreduced=True)


@pytest.mark.parametrize("stop", [1, 5, 12])
def test_what_a_hook_saved_at_the_end_of_a_batch_goes_on_with_the_next_one(stop, tmp_path):
    path = str(tmp_path / "hook.ckpt")
    assert metric_jobs.run(path, stop=stop) is None
    assert metric_jobs.run(path, go_on=True) == metric_jobs.run(path)
