"""What used to differ from Lightning without a word: one test for each, its oracle what Lightning (2.6.6) does."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import pytest
import rank_jobs
import torch
import torchmetrics
from small import Automatic, Small, loader, rows, says, trained, trainer
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader

from xtrain import LightningDataModule, LightningModule, ProtocolError, seed_everything
from xtrain.callbacks import Callback
from xtrain.loggers import CSVLogger, Logger
from xtrain.testing.ranks import Ranks


def test_everyone_waits_for_prepare_data(tmp_path):
    ranks = Ranks(2)
    try:
        assert ranks.run(partial(rank_jobs.prepared, str(tmp_path / "file"))) == [True, True]
    finally:
        ranks.close()


def test_data_is_prepared_before_the_module():
    calls = []

    class Data(LightningDataModule):
        def prepare_data(self):
            calls.append("data")

    class Module(Small):
        def prepare_data(self):
            calls.append("module")

    trainer().fit(Module(), loader(1), datamodule=Data())
    assert calls == ["data", "module"]


class Part(LightningModule):
    """A network inside another module, which asks where the training is."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(3, 1), []

    def forward(self, batch):
        self.seen.append((self.current_epoch, self.global_step))
        self.log("part", 1.0)
        assert self.optimizers().param_groups
        return self.layer(batch)


class Whole(Small):
    def __init__(self, late):
        super().__init__()
        self.late = late
        self.parts = nn.ModuleList([] if late else [Part()])

    def configure_model(self):
        if not self.parts:
            self.parts.append(Part())

    def loss(self, batch):
        return self.parts[0](batch).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("late", [False, True])
def test_modules_inside_of_a_module_see_its_trainer(late):
    module, run = trained(loader(2), Whole(late), max_epochs=2)
    part = module.parts[0]
    assert part.seen == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert part.trainer is run
    assert run.callback_metrics["part"] == 1.0
    with pytest.raises(ProtocolError):
        part.manual_backward(torch.ones(()))


class Scheduled(Automatic):
    """Notes the learning rate where an epoch ends."""

    def __init__(self, schedule=StepLR, **settings):
        super().__init__()
        self.schedule, self.settings, self.rates = schedule, settings, []

    def note(self):
        self.rates.append(round(self.optimizers().param_groups[0]["lr"], 6))

    on_train_batch_end = lambda self, *_: self.note()  # noqa: E731
    on_validation_epoch_end = on_train_epoch_end = on_train_end = note

    def validation_step(self, batch, batch_idx):
        self.log("val", 1.0)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        scheduler = StepLR(optimizer, 1, 0.1) if self.schedule is StepLR else ReduceLROnPlateau(optimizer, patience=0)
        return [optimizer], [{"scheduler": scheduler, "monitor": "val", **self.settings}]


@pytest.mark.parametrize(
    ("module", "options", "rates"),
    [
        # two batches, validation, end of the epoch, and the end: the schedule moves at the last batch
        (Scheduled(), {}, [1.0, 0.1, 0.1, 0.1, 0.1]),
        # of three batches only two are trained on: the epoch was not finished
        (Scheduled(), {"max_steps": 2, "batches": 3}, [1.0, 1.0, 1.0, 1.0]),
        # schedules that watch a metric move after the epoch's end
        (Scheduled(ReduceLROnPlateau), {"max_epochs": 2}, [1.0] * 4 + [1.0, 1.0, 1.0, 1.0, 0.1]),
        # not even if the epoch was not finished and there is no metric yet
        (Scheduled(ReduceLROnPlateau), {"max_steps": 2, "batches": 3}, [1.0, 1.0, 1.0, 1.0]),
        (Scheduled(frequency=2), {"max_epochs": 2}, [1.0] * 4 + [1.0, 0.1, 0.1, 0.1, 0.1]),
    ],
    ids=["epoch", "unfinished", "plateau", "plateau unfinished", "frequency"],
)
def test_schedules_of_epochs(module, options, rates):
    options = dict(options)
    batches = options.pop("batches", 2)
    trainer(num_sanity_val_steps=0, **options).fit(module, loader(batches), loader(1))
    assert module.rates == rates


def test_a_skipped_epoch_moves_its_schedule():
    class Skipping(Scheduled):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 1 else None

    module = Skipping()
    trainer().fit(module, loader(3))
    assert module.rates == [1.0, 1.0, 0.1]


@pytest.mark.parametrize("every", [1, 2])
def test_a_training_that_is_stopped_validates(every):
    class Stopping(Small):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.trainer.should_stop = batch_idx == 2

        def validation_step(self, batch, batch_idx):
            self.seen.append("validated")

    options = {"num_sanity_val_steps": 0, "check_val_every_n_epoch": every}
    module, _ = trained(loader(10), Stopping(), validate=loader(1), **options)
    assert module.seen == [0, 1, 2, *(["validated"] if every == 1 else [])]


class Validating(Small):
    def validation_step(self, batch, batch_idx):
        self.seen.append("validated")


@pytest.mark.parametrize("options", [{"check_val_every_n_epoch": 2}, {"val_check_interval": 100}, {"max_steps": 1}])
def test_a_fast_run_obeys_no_interval(options):
    module, run = trained(loader(9), Validating(), validate=loader(3), fast_dev_run=3, **options)
    assert module.seen == [0, 1, 2, *["validated"] * 3]
    assert run.fast_dev_run == 3


def test_a_fast_run_has_a_logger_that_swallows_everything(tmp_path):
    class Logging(Small):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.log("loss", 1.0)
            self.logger.experiment.add_image("fake", batch, self.global_step)
            self.logger.experiment["group"].append(3)
            self.logger.log_anything(key="samples", images=[batch])

    _, run = trained(module=Logging(), fast_dev_run=True, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert run.logger.experiment
    assert list(tmp_path.iterdir()) == []
    assert trained(fast_dev_run=True)[1].logger is None


def test_metrics_begin_empty_with_each_call():
    class Testing(Small):
        def training_step(self, batch, batch_idx):
            self.log("train", 1.0)

        def on_test_start(self):
            self.seen.append(dict(self.trainer.callback_metrics))

        def test_step(self, batch, batch_idx):
            self.log("test", 2.0)

    module, run = trained(module=Testing())
    assert dict(run.callback_metrics) == {"train": 1.0}
    run.test(module, loader(1))
    assert module.seen == [{}]
    assert dict(run.callback_metrics) == {"test": 2.0}


def test_an_optimizer_step_that_runs_no_closure_is_refused():
    class Forgetting(Automatic):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            optimizer.optimizer.step()

    with pytest.raises(ProtocolError) as caught:
        trained(module=Forgetting())
    says(caught.value, "closure", "optimizer.step(closure=closure)")


def test_clipping_gets_what_the_trainer_was_given():
    class Asking(Automatic):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.seen.append((gradient_clip_val, gradient_clip_algorithm))

    assert trained(loader(1), Asking())[0].seen[1:] == [(None, None)]
    given = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}
    assert trained(loader(1), Asking(), **given)[0].seen[1:] == [(0.5, "value")]


def test_default_predict_step_takes_what_lightnings_does():
    class Deferring(Small):
        def forward(self, batch):
            return batch.sum().item()

        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            assert super().predict_step(batch=batch) == self(batch)
            return super().predict_step(batch, batch_idx, dataloader_idx)

    batches = [rows(2), rows(2, 1)]
    assert trainer().predict(Deferring(), batches) == [batch.sum().item() for batch in batches]


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


@pytest.mark.parametrize("sanity", [0, 2])
def test_the_sanity_check_leaves_the_random_numbers(sanity):
    class Drawing(Small):
        def __init__(self):
            super().__init__()
            self.drawn = []

        def on_train_start(self):
            self.drawn.append(draws())

        def training_step(self, batch, batch_idx):
            self.drawn.append(batch)

        def validation_step(self, batch, batch_idx):
            draws()

    numbers = DataLoader(torch.arange(8.0), batch_size=1, shuffle=True)
    seed_everything(9)
    module, _ = trained(numbers, Drawing(), validate=DataLoader(rows(8), shuffle=True), num_sanity_val_steps=sanity)
    seed_everything(9)
    assert module.drawn[0] == draws()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(9))  # of seed and epoch, not of what was drawn
    assert [batch.item() for batch in module.drawn[1:]] == order.tolist()


class TwoPhases(Small):
    """A step with two optimizers, which asks for the count in its second phase."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        for number, opt in enumerate(self.optimizers()):
            self.seen.append(self.global_step)
            opt.zero_grad()
            self.manual_backward((self.net if number == 0 else self.other)(batch).pow(2).mean())
            opt.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net, self.other)]


@pytest.mark.parametrize(("counting", "seen", "end"), [("training", [0, 0, 1, 1], 2), ("optimizer", [0, 1, 2, 3], 4)])
def test_step_counting(counting, seen, end):
    module, run = trained(loader(2), TwoPhases(), step_counting=counting)
    assert (module.seen, run.global_step) == (seen, end)
    module, run = trained(loader(9), TwoPhases(), step_counting=counting, max_steps=4)
    assert len(module.seen) == {"training": 8, "optimizer": 4}[counting]
    assert run.global_step == 4


def test_an_optimizer_that_is_kept_from_counting():
    """Modules that want one count per batch replace two hooks of Lightning's wrapper of the second optimizer."""

    class OneCounts(TwoPhases):
        def training_step(self, batch, batch_idx):
            self.optimizers()[1]._on_before_step = self.optimizers()[1]._on_after_step = lambda: None
            super().training_step(batch, batch_idx)

    module, run = trained(loader(2), OneCounts(), step_counting="optimizer")
    assert (module.seen, run.global_step) == ([0, 1, 1, 2], 2)
    assert [opt.step_count for opt in module.optimizers()] == [2, 2]


def test_a_clip_value_of_zero_is_no_clipping():
    """Configurations that are shared by several modules switch clipping off by 0, beside manual optimization, too."""
    assert trainer(gradient_clip_val=0).gradient_clip_val is None
    run = trained(loader(2), TwoPhases(), gradient_clip_val=0)[1]
    assert run.global_step == 2
    with pytest.raises(ValueError, match="above zero"):
        trainer(gradient_clip_val=-1)


def test_step_counting_is_checked():
    with pytest.raises(ValueError, match="step_counting out of"):
        trainer(step_counting="batches")


def test_a_skip_by_a_callback_is_a_skip():
    class Skip(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            return -1

    assert trained(callbacks=[Skip()])[0].seen == []


class Rows(Logger):
    """Keeps what it is sent."""

    name = version = ""

    def __init__(self):
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, {name: value for name, value in metrics.items() if name != "epoch"}))


@pytest.mark.parametrize("every", [1, 3, 50])
def test_step_values_of_evaluation_are_rows_of_their_own(every):
    """Wherever the log points are; the axis counts the steps of that evaluation, over all epochs."""

    class Stepwise(Small):
        def validation_step(self, batch, batch_idx):
            self.log("single", torch.tensor(float(batch_idx)), on_step=True, on_epoch=False)
            self.log("both", float(batch_idx), on_step=True, on_epoch=True)

    logger = Rows()
    run = trainer(max_epochs=2, logger=logger, log_every_n_steps=every)
    run.fit(Stepwise(), loader(1), loader(4))
    epoch = [(i, {"single": float(i % 4), "both_step": float(i % 4)}) for i in range(8)]
    expected = [*epoch[:4], (0, {"both_epoch": 1.5}), *epoch[4:], (1, {"both_epoch": 1.5})]
    assert logger.rows == expected
    assert {name: value.item() for name, value in run.callback_metrics.items()} == {"both": 1.5, "both_epoch": 1.5}


def test_each_evaluation_loader_has_its_own_results():
    class Own(Small):
        def test_step(self, batch, batch_idx, dataloader_idx):
            self.log(f"only_{dataloader_idx}", 1.0, add_dataloader_idx=False)
            self.log("both", float(dataloader_idx))

        def on_test_epoch_end(self):
            self.log("end", 3.0)

    assert trainer().test(Own(), [loader(2), loader(2)]) == [
        {"only_0": 1.0, "both/dataloader_idx_0": 0.0, "end": 3.0},
        {"only_1": 1.0, "both/dataloader_idx_1": 1.0, "end": 3.0},
    ]


def test_metrics_can_be_set():
    class Setting(Small):
        def on_train_epoch_end(self):
            self.trainer.callback_metrics["mine"] = torch.tensor(4.0)
            self.log("summed", 2.0, reduce_fx="SUM", enable_graph=False, sync_dist_group=None)

    _, run = trained(module=Setting())
    assert {name: value.item() for name, value in run.callback_metrics.items()} == {"mine": 4.0, "summed": 2.0}
    del run.callback_metrics["mine"]
    assert "mine" not in run.callback_metrics


def test_a_collection_of_metrics_is_logged_without_copies():
    kinds = [torchmetrics.classification.MulticlassAccuracy(3), torchmetrics.classification.MulticlassF1Score(3)]
    collection = torchmetrics.MetricCollection(kinds)

    class Classifying(Small):
        def validation_step(self, batch, batch_idx):
            collection(torch.tensor([0, 1, 2, batch_idx]), torch.tensor([0, 1, 2, 2]))
            self.log_dict(collection)
            sources = [m.source for m in self.trainer.metrics._stage.metrics()]
            assert all(source.tp is collection[type(source).__name__].tp for source in sources)

    (result,) = trainer().validate(Classifying(), loader(2))
    plain = torchmetrics.MetricCollection([type(kind)(3) for kind in kinds])
    for index in range(2):
        plain.update(torch.tensor([0, 1, 2, index]), torch.tensor([0, 1, 2, 2]))
    assert result == pytest.approx({name: value.item() for name, value in plain.compute().items()})
