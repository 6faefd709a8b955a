"""Options of the Trainer that few trainings need, each against what it should do to a small training."""

from __future__ import annotations

import json
import time

import pytest
import torch
from small import Automatic, Doing, Small, assert_equal, loader, rows, says, trained, trainer
from torch import nn
from torch.utils.data import DataLoader

from xtrain import ConfigurationError, LightningDataModule, Trainer
from xtrain.callbacks import LambdaCallback, ModelSummary, ProgressBar, Timer
from xtrain.callbacks.profiler import Profiler
from xtrain.testing.ranks import Ranks


def stop_at_once():
    return LambdaCallback(on_train_batch_end=lambda trainer, *_: setattr(trainer, "should_stop", True))


# ---------------------------------------------------------------- how long


@pytest.mark.parametrize(
    ("options", "steps"),
    [({}, 1), ({"min_epochs": 2}, 8), ({"min_steps": 6}, 6), ({"min_epochs": 1, "min_steps": 6}, 6)],
)
def test_nobody_stops_the_training_before_its_minimum(options, steps):
    assert trained(callbacks=stop_at_once(), max_epochs=5, **options)[1].global_step == steps


def test_max_time_ends_the_training():
    class Slow(Small):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            time.sleep(0.05)

    run = trained(module=Slow(), max_epochs=1000, max_time={"seconds": 0.2})[1]
    assert 1 <= run.global_step < 100
    assert [type(c) for c in run.callbacks] == [ModelSummary, Timer]


# ---------------------------------------------------------------- which batches


class Reads(Small):
    def __init__(self):
        super().__init__()
        self.read = {"train": [], "val": []}

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.read["train"].append(batch)

    def validation_step(self, batch, batch_idx):
        self.read["val"].append(batch)


@pytest.mark.parametrize("amount", [2, 0.5])
def test_overfitting_reads_the_same_few_batches_in_order(amount):
    data = rows(8)
    shuffled = DataLoader(data, batch_size=2, shuffle=True)  # type: ignore[arg-type]
    module, _ = trained(
        shuffled, Reads(), validate=shuffled, max_epochs=2, overfit_batches=amount, num_sanity_val_steps=0
    )
    for read in module.read.values():
        assert torch.equal(torch.cat(read), torch.cat([data[:4], data[:4]]))


@pytest.mark.parametrize(("every", "expected"), [(0, [0]), (1, [0, 1, 2, 3]), (2, [0, 2])])
def test_loaders_are_asked_for_again(every, expected):
    asked = []

    class Data(LightningDataModule):
        def train_dataloader(self):
            asked.append(self.trainer.current_epoch)
            return loader(2)

    run = trainer(max_epochs=4, reload_dataloaders_every_n_epochs=every)
    run.fit(Small(), datamodule=Data())
    assert asked == expected
    assert run.global_step == 8


def read_on_both(world_size, rank):
    module, _ = trained(DataLoader(rows(8), batch_size=2), Reads(), use_distributed_sampler=False)
    return torch.cat(module.read["train"])


class Normed(Small):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.kinds = []

    def loss(self, batch):
        self.kinds.append(type(self.norm).__name__)
        return self.net(batch).pow(2).mean()


def synchronised(world_size, rank):
    module, _ = trained(module=Normed(), sync_batchnorm=True)
    with pytest.raises(ConfigurationError, match="num_nodes=2 hosts"):
        trained(num_nodes=2)
    return set(module.kinds), type(module.norm).__name__, [n for n, _ in module.named_parameters()]


def test_two_processes():
    ranks = Ranks(2)
    try:
        both = ranks.run(read_on_both)
        norms = ranks.run(synchronised)
    finally:
        ranks.close()
    assert all(torch.equal(read, rows(8)) for read in both)
    names = ["net.weight", "net.bias", "norm.weight", "norm.bias"]
    assert norms == [({"SyncBatchNorm"}, "BatchNorm1d", names)] * 2


def test_one_process_needs_no_synchronised_norm():
    assert set(trained(module=Normed(), sync_batchnorm=True, num_nodes=1)[0].kinds) == {"BatchNorm1d"}


# ---------------------------------------------------------------- switches of torch


def switches():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.is_anomaly_enabled(),
    )


@pytest.mark.parametrize(
    ("options", "inside"),
    [
        ({}, (False, False, False, False)),
        ({"deterministic": True, "benchmark": True}, (True, False, False, False)),
        ({"deterministic": "warn"}, (True, True, False, False)),
        ({"benchmark": True}, (False, False, True, False)),
    ],
)
def test_switches_hold_during_a_run_only(options, inside):
    before, seen = switches(), []
    trained(callbacks=LambdaCallback(on_train_batch_end=lambda *_: seen.append(switches())), **options)
    assert set(seen) == {inside}
    assert switches() == before


def test_anomaly_detection_names_the_forward():
    def nan(module, opt, batch):
        module.manual_backward((module.net(batch) * 0).sqrt().sum() * 0)

    with (
        pytest.raises(RuntimeError, match="returned nan values"),
        pytest.warns(UserWarning, match="Traceback of forward"),
    ):
        trained(module=Doing(nan), detect_anomaly=True)
    assert not torch.is_anomaly_enabled()


# ---------------------------------------------------------------- what is shown


def test_a_profile_has_the_verbs_of_the_step_and_a_trace(tmp_path, capsys):
    module, _ = trained(loader(8), profiler={"active": 3}, default_root_dir=tmp_path)
    out = capsys.readouterr().out
    events = json.loads((tmp_path / "trace_rank0.json").read_text())["traceEvents"]
    verbs = [event["name"] for event in events if str(event.get("name")).startswith("xtrain.")]
    for verb in ("zero_grad", "backward", "step", "step_boundary", "batch_to_device"):
        assert verbs.count(f"xtrain.{verb}") == 3
        assert f"xtrain.{verb}" in out
    assert_equal(module.net, trained(loader(8))[0].net)


@pytest.mark.parametrize("asked", [True, "simple", torch.profiler.profile(), Profiler()])
def test_profilers_may_be_asked_for_in_several_ways(asked, tmp_path, capsys):
    run = trained(profiler=asked, default_root_dir=tmp_path)[1]
    assert [type(c) for c in run.callbacks] == [ModelSummary, Profiler]
    assert vars(run.backend).keys().isdisjoint({"step", "backward"})
    with pytest.raises(ConfigurationError) as caught:
        trainer(profiler="fast")
    says(caught.value, "profiler=True")


def test_a_bare_training_has_nothing_but_the_training():
    run = Trainer(backend="cpu", max_epochs=1, barebones=True)
    assert (run.callbacks, run.loggers, run.num_sanity_val_steps, run.log_every_n_steps) == ([], [], 0, 0)
    with pytest.raises(ConfigurationError) as caught:
        Trainer(barebones=True, logger=True)
    says(caught.value, "logger=True")


def test_a_summary_is_written_unless_somebody_says_no():
    def kinds(**options):
        return [type(c) for c in Trainer(backend="cpu", **options).callbacks]

    assert kinds() == kinds(enable_model_summary=True) == [ModelSummary, ProgressBar]
    assert kinds(enable_model_summary=False) == [ProgressBar]
    assert kinds(callbacks=[ModelSummary(max_depth=3)]) == [ModelSummary, ProgressBar]
    with pytest.raises(ConfigurationError) as caught:
        Trainer(barebones=True, enable_model_summary=True)
    says(caught.value, "enable_model_summary=True")


# ---------------------------------------------------------------- where they come from


def test_arguments_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("PL_TRAINER_MAX_EPOCHS", "7")
    monkeypatch.setenv("PL_TRAINER_MIN_STEPS", "3")
    monkeypatch.setenv("PL_TRAINER_ACCELERATOR", "cpu")
    monkeypatch.setenv("PL_TRAINER_LIMIT_TRAIN_BATCHES", "0.5")
    run = Trainer()
    assert (run.max_epochs, run.options.min_steps, run.limit_train_batches, run.backend.name) == (7, 3, 0.5, "cpu")
    assert Trainer(max_epochs=2).max_epochs == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_epochs", -1),
        ("min_steps", 0.5),
        ("num_nodes", 0),
        ("overfit_batches", 1.5),
        ("deterministic", "yes"),
        ("reload_dataloaders_every_n_epochs", -1),
        ("max_time", "soon"),
    ],
)
def test_nonsense_is_refused(name, value):
    with pytest.raises(ConfigurationError) as caught:
        trainer(**{name: value})
    says(caught.value, repr(value))


def test_an_automatic_training_stops_no_earlier_either():
    assert trained(module=Automatic(), callbacks=stop_at_once(), max_epochs=5, min_steps=3)[1].global_step == 3
