"""Validation during training, and validate, test and predict on their own."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from small import Small, loader, rows, says, trained, trainer
from torch import nn

from xtrain import ConfigurationError


class Evaluated(Small):
    """Notes when it is evaluated; logs the mean of each batch."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.seen[-1] = f"t{batch_idx}"

    def validation_step(self, batch, batch_idx):
        self.seen.append("s" if self.trainer.sanity_checking else "v")
        self.log("mean", batch.mean())

    def test_step(self, batch, batch_idx):
        self.log("mean", batch.mean())

    def predict_step(self, batch, batch_idx):
        return batch.sum()


def story(source="sized", validate=None, **options):
    options = {"num_sanity_val_steps": 0, **options}
    return " ".join(trained(source, Evaluated(), validate=validate or loader(1), **options)[0].seen)


class Unsized:
    def __iter__(self):
        return iter([rows(2)] * 4)


# ---------------------------------------------------------------- when it validates


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "t0 t1 t2 t3 v"),
        ({"max_epochs": 2, "limit_train_batches": 1}, "t0 v t0 v"),
        ({"max_epochs": 4, "limit_train_batches": 1, "check_val_every_n_epoch": 2}, "t0 t0 v t0 t0 v"),
        ({"val_check_interval": 2}, "t0 t1 v t2 t3 v"),
        ({"val_check_interval": 3}, "t0 t1 t2 v t3"),
        ({"val_check_interval": 0.5}, "t0 t1 v t2 t3 v"),
        ({"val_check_interval": 0.25}, "t0 v t1 v t2 v t3 v"),
        ({"val_check_interval": 1.0}, "t0 t1 t2 t3 v"),
        ({"limit_val_batches": 0}, "t0 t1 t2 t3"),
        ({"fast_dev_run": True}, "t0 v"),
    ],
)
def test_when_validation_runs(options, expected):
    assert story(**options) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "t0 t1 t2 t3 v"),
        ({"val_check_interval": 2}, "t0 t1 v t2 t3 v"),
        ({"val_check_interval": 1.0}, "t0 t1 t2 t3 v"),
    ],
)
def test_when_validation_runs_with_an_unsized_loader(options, expected):
    assert story(Unsized(), **options) == expected


@pytest.mark.parametrize("interval", [0, -1, 0.0, -0.5, 1.5, float("nan"), "half", True])
def test_meaningless_validation_interval_is_refused_at_once(interval):
    with pytest.raises(ConfigurationError) as caught:
        trainer(val_check_interval=interval)
    says(caught.value, "val_check_interval", repr(interval))


@pytest.mark.parametrize(("source", "interval"), [("sized", 5), (Unsized(), 0.5)])
def test_impossible_validation_interval_is_refused_before_the_first_batch(source, interval):
    module = Evaluated()
    with pytest.raises(ConfigurationError) as caught:
        trained(source, module, validate=loader(1), val_check_interval=interval, num_sanity_val_steps=0)
    says(caught.value, "val_check_interval")
    assert module.seen == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_sanity_val_steps": 2}, "s s t0 v v v"),
        ({"num_sanity_val_steps": 9}, "s s s t0 v v v"),
        ({"num_sanity_val_steps": 0}, "t0 v v v"),
        ({"num_sanity_val_steps": 2, "limit_val_batches": 1}, "s t0 v"),
        ({"num_sanity_val_steps": 2, "limit_val_batches": 0}, "t0"),
        ({"num_sanity_val_steps": 2, "fast_dev_run": True}, "t0 v"),
    ],
)
def test_sanity_check(options, expected):
    assert story(validate=loader(3), limit_train_batches=1, **options) == expected


def test_sanity_check_leaves_no_metric_behind():
    class Looking(Evaluated):
        def on_sanity_check_end(self): ...

        def on_train_start(self):
            self.found = dict(self.trainer.callback_metrics)

    module, run = trained(module=Looking(), validate=loader(1))
    assert module.found == {}
    assert set(run.callback_metrics) == {"mean"}


def test_without_validation_hooks_are_silent():
    class Loud(Evaluated):
        def on_validation_start(self):
            raise AssertionError("nothing is validated")

    trained(module=Loud(), validate=loader(1), limit_val_batches=0)
    trained(module=Loud(), validate=[])
    trained(module=Loud())


def test_state_while_it_validates():
    class States(Evaluated):
        def note(self):
            state = self.trainer
            names = ("training", "validating", "testing", "predicting", "sanity_checking")
            self.seen.append([name for name in names if getattr(state, name)])

        def training_step(self, batch, batch_idx):
            self.note()

        def validation_step(self, batch, batch_idx):
            self.note()

        def test_step(self, batch, batch_idx):
            self.note()

        def predict_step(self, batch, batch_idx):
            self.note()

    module, run = trained(module=States(), validate=loader(1), limit_train_batches=1)
    run.validate(module, loader(1))
    run.test(module, loader(1))
    run.predict(module, loader(1))
    module.note()
    expected = [["sanity_checking"], ["training"], ["validating"], ["validating"], ["testing"], ["predicting"], []]
    assert module.seen == expected


# ---------------------------------------------------------------- modes


class Modes(Evaluated):
    """A frozen part stays in eval mode throughout, though training has dropout elsewhere."""

    def __init__(self):
        super().__init__()
        self.dropout, self.frozen = nn.Dropout(), nn.BatchNorm1d(3).eval()
        self.alias = nn.Sequential(self.frozen)  # restoring the mode of this one must not reach into it
        self.modes = []

    def note(self, place):
        self.modes.append((place, self.training, self.dropout.training, self.frozen.training))

    def training_step(self, batch, batch_idx):
        self.note("train")

    def validation_step(self, batch, batch_idx):
        self.note("validate")
        assert not torch.is_grad_enabled()


TRAIN, VALIDATE = ("train", True, True, False), ("validate", False, False, False)


@pytest.mark.filterwarnings("ignore:Expected every layer in train mode")
def test_modes_of_submodules_are_kept():
    module, _ = trained(loader(2), Modes(), validate=loader(1), val_check_interval=1)
    assert module.modes == [VALIDATE, TRAIN, VALIDATE, TRAIN, VALIDATE]
    assert (module.training, module.dropout.training, module.frozen.training) == (True, True, False)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_modes_are_kept_after_an_exception(stage):
    class Broken(Modes):
        def validation_step(self, batch, batch_idx):
            raise KeyError

        test_step = predict_step = validation_step

    module = Broken()
    with pytest.raises(KeyError):
        getattr(trainer(), stage)(module, loader())
    assert (module.training, module.dropout.training, module.frozen.training) == (True, True, False)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("inference", [True, False])
def test_inference_mode(inference):
    class Mode(Evaluated):
        def validation_step(self, batch, batch_idx):
            self.seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    module = Mode()
    trainer(inference_mode=inference).validate(module, loader(1))
    assert module.seen == [(False, inference)]


# ---------------------------------------------------------------- results


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_metrics_of_one_loader(stage):
    (result,) = getattr(trainer(), stage)(Evaluated(), loader(4))
    assert result == {"mean": pytest.approx(rows(8).mean().item())}


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_metrics_of_several_loaders(stage):
    class Several(Evaluated):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("mean", batch.mean())

        test_step = validation_step

    results = getattr(trainer(), stage)(Several(), [loader(1, seed=1), loader(2, seed=2)])
    means = [rows(2, seed=1).mean().item(), rows(4, seed=2).mean().item()]
    assert results == [{f"mean/dataloader_idx_{i}": pytest.approx(mean)} for i, mean in enumerate(means)]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_metrics_of_a_step_that_logs_nothing(stage):
    class Silent(Evaluated):
        def validation_step(self, batch, batch_idx): ...

        test_step = validation_step

    assert getattr(trainer(), stage)(Silent(), loader(1)) == [{}]


def test_predictions_of_one_loader():
    assert trainer().predict(Evaluated(), loader(3)) == [batch.sum() for batch in loader(3)]


def test_predictions_of_several_loaders():
    class Several(Evaluated):
        def predict_step(self, batch, batch_idx, dataloader_idx):
            return dataloader_idx, batch_idx

    predictions = trainer().predict(Several(), [loader(2), loader(1)])
    assert predictions == [[(0, 0), (0, 1)], [(1, 0)]]


def test_prediction_defaults_to_the_forward():
    class Forward(Small):
        def forward(self, batch):
            return self.net(batch)

    module = Forward()
    predictions = trainer().predict(module, loader(2))
    assert torch.equal(torch.cat(predictions), module(rows(4)).detach())


@pytest.mark.parametrize(("stage", "limit"), [("test", "limit_test_batches"), ("predict", "limit_predict_batches")])
@pytest.mark.parametrize(("value", "count"), [(2, 2), (0.5, 2), (1.0, 4), (9, 4), (0, 0)])
def test_limits(stage, limit, value, count):
    class Counting(Evaluated):
        def test_step(self, batch, batch_idx):
            self.seen.append(batch_idx)

        predict_step = test_step

    module = Counting()
    getattr(trainer(**{limit: value}), stage)(module, loader(4))
    assert module.seen == list(range(count))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_no_loader(stage):
    with pytest.raises(ConfigurationError) as caught:
        getattr(trainer(), stage)(Evaluated())
    says(caught.value, f"trainer.{stage}(model, loader)")


@pytest.mark.parametrize("empty", [loader(0).dataset, iter(()), [[]]], ids=["sized", "unsized", "list"])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_empty_loader(stage, empty):
    with pytest.raises(ConfigurationError) as caught:
        getattr(trainer(), stage)(Evaluated(), empty)
    says(caught.value, "at least one batch")


def test_evaluation_needs_no_optimizer_and_changes_nothing():
    class NoOptimizer(Evaluated):
        def configure_optimizers(self):
            raise AssertionError("nothing is trained")

    module = NoOptimizer()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    run = trainer()
    run.validate(module, loader(2))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert run.global_step == 0


def test_evaluation_between_two_fits_keeps_the_count():
    module, run = trained(module=Evaluated())
    run.test(module, loader(1))
    run.max_epochs = 2
    run.fit(module, loader())
    assert (run.global_step, run.current_epoch) == (8, 2)


@pytest.mark.parametrize("every", ["00:00:00:02", timedelta(seconds=2), {"seconds": 2}])
@pytest.mark.parametrize("epochs", [1, None])
def test_validation_after_some_time(every, epochs, monkeypatch):
    """Each training step and each validation lasts a second of a clock that the test turns."""
    now = [100.0]
    monkeypatch.setattr("xtrain.clock.time.monotonic", lambda: now[0])
    order = []

    class Slow(Small):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            now[0] += 1.0
            order.append("t")

        def validation_step(self, batch, batch_idx):
            now[0] += 5.0
            order.append("v")

    options = {"num_sanity_val_steps": 0, "val_check_interval": every, "check_val_every_n_epoch": epochs}
    trained(loader(5), Slow(), validate=loader(1), max_epochs=2, **options)
    assert "".join(order) == "ttv" * 5


@pytest.mark.parametrize("wrong", ["00:00:02", {"minute": 1}, "00:00:00:00", timedelta(0)])
def test_a_time_between_validations_that_means_nothing(wrong):
    with pytest.raises(ConfigurationError) as caught:
        trainer(val_check_interval=wrong)
    says(caught.value, "DD:HH:MM:SS", "val_check_interval='00:00:30:00'")


@pytest.mark.parametrize("place", ["sampler", "dataset"])
def test_loaders_of_evaluation_hear_of_the_epoch(place):
    """A part of a loader with `set_epoch` gets the number of epochs that were finished, in each evaluation."""

    class Heard:
        def __init__(self):
            self.epochs = []

        def __iter__(self):
            self.epochs.append(self.epoch)
            return iter([0, 1])

        def __len__(self):
            return 2

        def __getitem__(self, index):
            self.epochs += [self.epoch] if index == 0 and place == "dataset" else []
            return torch.ones(3)

        def set_epoch(self, epoch):
            self.epoch = epoch

    heard = Heard()
    heard_rows = torch.utils.data.DataLoader(heard, sampler=heard if place == "sampler" else None)
    run = trainer(max_epochs=2, num_sanity_val_steps=1)
    run.fit(Evaluated(), loader(2), heard_rows)
    run.validate(Evaluated(), heard_rows)
    assert heard.epochs == [0, 0, 1, 2]
