"""`MetricLog`: when values are read, what they are reduced to, and what is refused."""

from __future__ import annotations

import gc
import math
import re
import weakref
from dataclasses import replace

import pytest
import torch
import torchmetrics
from hypothesis import given
from hypothesis import strategies as st
from small import says
from torch.utils._python_dispatch import TorchDispatchMode

from xtrain import Backend, LightningModule, Trainer
from xtrain.collectives import Collectives
from xtrain.errors import ConfigurationError
from xtrain.loggers import Logger
from xtrain.metrics.log import MetricLog


class Recorder(Logger):
    """Keeps the rows it was sent."""

    name = "recorder"
    version = 0

    def __init__(self):
        self.rows, self.saves = [], 0

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def save(self):
        self.saves += 1


class Reader:
    """Reads as a backend does, and remembers how many scalars each read brought."""

    def __init__(self):
        self.sizes = []

    def __call__(self, values):
        self.sizes.append(len(values))
        assert all(value.dim() == 0 for value in values)
        return torch.stack([value.detach().double() for value in values]).tolist()


class Alone(Collectives):
    def all_reduce(self, tensor, op="mean", *, met=False):
        raise AssertionError("nothing was to be reduced over the ranks")


def make(every=1, ranks=None, asynchronous=True):
    log = MetricLog(Reader(), ranks or Alone(), every, asynchronous)
    log.loggers = [Recorder()]
    return log


def rows(log):
    return log.loggers[0].rows


def reads(log):
    return log._read_scalars.sizes


@pytest.fixture
def training():
    log = make(every=3)
    with log.stage("train"):
        log.hook("training_step")
        yield log


# ---------------------------------------------------------------- when values are read


def test_nothing_is_read_between_log_points_and_everything_at_once_at_one(training):
    for step in range(1, 7):
        training.set_batch(torch.zeros(4, 2))
        training.log("loss", torch.tensor(float(step)), prog_bar=True)
        training.log("accuracy", torch.tensor(step / 10), on_epoch=True)
        training.checks["norm"] = torch.tensor(float(10 * step))
        checks = training.flush_step(step, 0)
        assert checks == ({"norm": 10.0 * step} if step % 3 == 0 else {})
    assert reads(training) == [1 + 3 + 1] * 2  # newest loss, three accuracies for the epoch, the check
    assert rows(training) == [
        (3, {"epoch": 0, "loss": 3.0, "accuracy_step": pytest.approx(0.3)}),
        (6, {"epoch": 0, "loss": 6.0, "accuracy_step": pytest.approx(0.6)}),
    ]
    assert training.progress_bar_metrics == {"loss": 6.0}


class Operations(TorchDispatchMode):
    """Remembers every operation that reaches a device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_logging_gives_the_device_no_work(training):
    loss = torch.ones((), requires_grad=True) * 2
    training.set_batch(torch.zeros(4, 2))
    with Operations() as operations:
        training.log("loss", loss, prog_bar=True, on_epoch=True)
        training.log("norm", loss.detach())
        training.flush_step(1, 0)
    assert set(operations.names) <= {"detach"}


def test_what_was_read_is_not_kept_on_the_device(training):
    loss = torch.tensor(2.0)
    alive = weakref.ref(loss)
    training.log("loss", loss, on_epoch=True)
    del loss
    training.flush(1, 0)
    assert alive() is None
    assert training.callback_metrics["loss"] == 2.0


def test_a_value_and_a_check_are_read_once(training):
    training.log("loss", torch.tensor(1.0))
    training.checks["finite"] = torch.tensor(1.0)
    assert training.flush(1, 0) == {"finite": 1.0}
    assert training.flush(2, 0) == {}
    assert [step for step, _ in rows(training)] == [1]


def test_log_points_continue_over_epochs_of_few_batches(training):
    for epoch in range(2):
        for step in range(2):
            training.log("loss", torch.tensor(1.0 * step))
            training.flush_step(2 * epoch + step + 1, epoch)
        training.reduce_epoch()
        training.send_epoch(2 * epoch + 2, epoch)
    sent = [(2, {"epoch": 0, "loss": 1.0}), (3, {"epoch": 1, "loss": 0.0}), (4, {"epoch": 1, "loss": 1.0})]
    assert rows(training) == sent
    training.flush(4, 1)
    assert rows(training) == sent


def test_without_log_points_only_epoch_values_are_sent_and_memory_is_bounded():
    log = make(every=0)
    with log.stage("train"):
        log.hook("training_step")
        for step in range(1, 2101):
            log.log("x", torch.tensor(1.0), on_step=True, on_epoch=True, reduce_fx="sum")
            log.flush_step(step, 0)
        assert reads(log) == [1000, 1000]
        log.reduce_epoch()
        log.send_epoch(2100, 0)
    assert rows(log) == [(2100, {"epoch": 0, "x_epoch": 2100.0})]


class Saved:
    """What autograd keeps of an operation; weak references to it can be made."""

    def __init__(self, tensor):
        self.tensor = tensor


def test_logged_losses_hold_no_graph(training):
    saved = []

    def keep(tensor):
        holder = Saved(tensor)
        saved.append(weakref.ref(holder))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda holder: holder.tensor):
        loss = torch.ones(5, requires_grad=True).square().sum()
    training.log("loss", loss, on_epoch=True)
    training.log("newest", loss)
    assert [reference() is None for reference in saved] == [False]
    del loss
    gc.collect()
    assert [reference() is None for reference in saved] == [True]


def test_the_batch_is_released_at_the_end_of_an_epoch(training):
    batch = torch.zeros(3)
    alive = weakref.ref(batch)
    training.set_batch(batch)
    del batch
    training.reduce_epoch()
    assert alive() is None


# ---------------------------------------------------------------- values that change after they were logged


def test_a_buffer_changed_in_place_is_logged_as_it_was(training):
    total = torch.zeros(())
    for _ in range(3):
        total += 1
        training.log("total", total, on_step=False, on_epoch=True, reduce_fx="sum")
    training.reduce_epoch()
    assert training.callback_metrics["total"] == 1 + 2 + 3


def test_a_parameter_is_logged_as_it_was_before_the_step(training):
    temperature = torch.nn.Parameter(torch.tensor([2.0]))
    training.log("temperature", temperature)
    with torch.no_grad():
        temperature.fill_(5.0)
    training.flush(1, 0)
    assert rows(training)[0][1]["temperature"] == 2.0


def test_tensors_of_inference_mode_are_taken():
    log = make()
    with log.stage("validate"), torch.inference_mode():
        log.hook("validation_step")
        total = torch.zeros(())
        for _ in range(2):
            total += 1
            log.log("total", total)
    with log.stage("validate"):
        log.hook("validation_step")
        log.log("x", total)
        log.reduce_epoch()
        assert log.callback_metrics["x"] == 2.0


# ---------------------------------------------------------------- reductions


@given(
    epochs=st.lists(st.tuples(st.floats(-100, 100), st.integers(1, 9)), min_size=1, max_size=20),
    every=st.integers(1, 7),
    op=st.sampled_from(["mean", "sum", "min", "max", torch.mean, torch.sum, min, max]),
    as_tensor=st.booleans(),
)
def test_an_epoch_is_reduced_as_if_it_were_one_list(epochs, every, op, as_tensor):
    log = make(every)
    with log.stage("train"):
        log.hook("training_step")
        for step, (value, size) in enumerate(epochs):
            log.set_batch({"x": torch.zeros(size, 2)})
            log.log("v", torch.tensor(value, dtype=torch.float64) if as_tensor else value, on_epoch=True, reduce_fx=op)
            log.flush_step(step, 0)
        log.reduce_epoch()
        result = log.send_epoch(len(epochs), 0)["v_epoch"]
    values, sizes = [v for v, _ in epochs], [n for _, n in epochs]
    name = op if isinstance(op, str) else op.__name__
    expected = {
        "mean": sum(v * n for v, n in epochs) / sum(sizes),
        "sum": sum(values),
        "min": min(values),
        "max": max(values),
    }[name]
    assert result == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("op", ["mean", "sum", "min", "max"])
def test_nan_is_not_lost_in_an_epoch(op):
    log = make(every=2)
    with log.stage("train"):
        log.hook("training_step")
        for step, value in enumerate([1.0, math.nan, 2.0, 3.0]):
            log.log("v", torch.tensor(value), on_epoch=True, reduce_fx=op)
            log.flush_step(step, 0)
        log.reduce_epoch()
        assert log.callback_metrics["v"].isnan()


def test_a_function_reduces_all_values_of_the_epoch(training):
    for step, value in enumerate([5.0, 1.0, 2.0, 9.0]):
        training.log("v", torch.tensor(value), on_step=False, on_epoch=True, reduce_fx=second_largest)
        training.flush_step(step, 0)
    training.reduce_epoch()
    assert training.callback_metrics["v"] == 5.0


def second_largest(values):
    return values.sort().values[-2]


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(6, 2), 6),
        ((torch.tensor(3.0), [{"x": torch.zeros(4)}]), 4),
        ({"ids": ["a", "b"], "x": torch.zeros(5)}, 5),
        (None, 1),
        (["text"], 1),
    ],
)
def test_the_mean_is_weighted_by_the_size_of_the_batch(training, batch, size):
    training.set_batch(batch)
    training.log("v", 1.0, on_step=False, on_epoch=True)
    training.set_batch(None)
    training.log("v", 0.0, on_step=False, on_epoch=True, batch_size=10)
    training.reduce_epoch()
    assert training.callback_metrics["v"].item() == pytest.approx(size / (size + 10))


def test_each_epoch_starts_anew(training):
    results = []
    for epoch, value in enumerate([1.0, 5.0]):
        training.log("v", value, on_epoch=True)
        training.reduce_epoch()
        results.append(training.send_epoch(epoch, epoch))
    assert results == [{"v_epoch": 1.0}, {"v_epoch": 5.0}]


# ---------------------------------------------------------------- names and views


def test_callback_metrics_have_the_newest_step_value_and_then_the_epoch(training):
    seen = training.callback_metrics
    for value in (1.0, 3.0):
        training.log("loss", torch.tensor([value]), on_epoch=True)
        training.log("only_epoch", 1, on_step=False, on_epoch=True)
    assert dict(seen) == {"loss": 3.0, "loss_step": 3.0}
    assert reads(training) == []
    training.reduce_epoch()
    assert dict(seen) == {"loss": 2.0, "loss_step": 3.0, "loss_epoch": 2.0, "only_epoch": 1.0}
    assert all(isinstance(value, torch.Tensor) and value.shape == () for value in seen.values())
    training.send_epoch(1, 0)
    training.hook("training_step")
    training.log("loss", torch.tensor(7.0), on_epoch=True)
    assert seen["loss"] == 7.0
    assert seen["loss_epoch"] == 2.0
    with pytest.raises(KeyError):
        seen["other"]


def test_hooks_at_the_end_of_an_epoch_see_its_metrics_and_add_their_own(training):
    training.log("loss", torch.tensor(4.0), on_step=False, on_epoch=True, prog_bar=True)
    training.reduce_epoch()
    training.hook("on_train_epoch_end")
    training.log("half", training.callback_metrics["loss"] / 2)
    assert training.callback_metrics["half"] == 2.0
    assert training.progress_bar_metrics == {"loss": 4.0}
    assert training.send_epoch(9, 2) == {"loss": 4.0, "half": 2.0}
    assert rows(training) == [(9, {"epoch": 2, "loss": 4.0, "half": 2.0})]
    assert training.loggers[0].saves == 1
    assert dict(training.logged_metrics) == {"loss": 4.0, "half": 2.0}


def test_logger_false_is_not_sent_but_can_be_monitored(training):
    training.log("quiet", 1.0, logger=False, on_epoch=True, prog_bar=True)
    training.reduce_epoch()
    training.send_epoch(1, 0)
    assert rows(training) == []
    assert dict(training.logged_metrics) == {}
    assert training.callback_metrics["quiet"] == 1.0
    assert training.progress_bar_metrics == {"quiet_step": 1.0, "quiet_epoch": 1.0}


def test_validation_inside_training_is_apart_and_training_goes_on(training):
    training.set_batch(torch.zeros(2))
    training.log("loss", 1.0, on_epoch=True)
    training.checks["loss"] = torch.tensor(1.0)
    with training.stage("validate"):
        training.hook("validation_step")
        training.set_batch(torch.zeros(8))
        training.log("loss", 10.0)
        training.reduce_epoch()
        assert training.send_epoch(1, 0) == {"loss": 10.0}
    assert training.callback_metrics["loss"] == 10.0
    training.log("loss", 2.0, on_epoch=True)
    assert training.flush(2, 0) == {"loss": 1.0}
    training.reduce_epoch()
    assert training.send_epoch(2, 0) == {"loss_epoch": 1.5}


def test_the_sanity_check_leaves_nothing_behind():
    log = make()
    metric = torchmetrics.MeanMetric()
    with log.stage("sanity"):
        log.hook("validation_step")
        metric.update(3.0)
        log.log("mean", metric)
        log.log("loss", torch.tensor(1.0), prog_bar=True)
        log.reduce_epoch()
        assert log.callback_metrics["loss"] == 1.0
        assert log.send_epoch(0, 0) == {"mean": 3.0, "loss": 1.0}
    assert (dict(log.callback_metrics), dict(log.logged_metrics), log.progress_bar_metrics) == ({}, {}, {})
    assert rows(log) == []
    assert log.loggers[0].saves == 0
    assert metric.update_count == 0


def test_several_loaders_are_told_apart():
    log = make()
    with log.stage("test"):
        for loader, value in enumerate([1.0, 2.0]):
            log.set_batch(torch.zeros(2), loader)
            log.hook("test_step")
            log.log("loss", value)
            log.log("both", value, on_step=True, on_epoch=True)
            log.log(f"mine_{loader}", value, add_dataloader_idx=False)
        log.reduce_epoch()
        log.hook("on_test_epoch_end")
        log.log("all", 3.0)
        assert log.send_epoch(0, 0) == {
            "loss/dataloader_idx_0": 1.0,
            "both_epoch/dataloader_idx_0": 1.0,
            "mine_0": 1.0,
            "loss/dataloader_idx_1": 2.0,
            "both_epoch/dataloader_idx_1": 2.0,
            "mine_1": 2.0,
            "all": 3.0,
        }
    assert log.callback_metrics["both/dataloader_idx_1"] == 2.0


def test_hooks_inside_a_step_log_as_the_step_does(training):
    training.log("loss", 1.0, on_epoch=True)
    training.hook("on_before_optimizer_step")
    training.log("norm", 5.0)
    training.log("loss", 3.0, on_epoch=True)
    training.reduce_epoch()
    assert training.send_epoch(1, 0) == {"loss_epoch": 2.0}
    assert rows(training)[0][1]["norm"] == 5.0


def test_one_name_in_two_hooks_with_different_settings(training):
    training.log("loss", 1.0)
    training.reduce_epoch()
    training.hook("on_train_epoch_end")
    training.log("loss", 8.0)
    assert training.send_epoch(1, 0) == {"loss": 8.0}


# ---------------------------------------------------------------- torchmetrics


def test_a_torchmetrics_object_is_computed_and_reset_by_the_log(training):
    accuracy = torchmetrics.classification.MulticlassAccuracy(num_classes=3, average="micro")
    target = torch.tensor([0, 1, 2, 2])
    for prediction in (torch.tensor([0, 1, 2, 2]), torch.tensor([0, 0, 0, 0])):
        accuracy(prediction, target)
        training.log("accuracy", accuracy, on_step=True, on_epoch=True)
    assert training.callback_metrics["accuracy"] == 0.25
    training.reduce_epoch()
    assert training.callback_metrics["accuracy"] == training.callback_metrics["accuracy_epoch"] == 0.625
    assert accuracy.update_count == 2
    assert training.send_epoch(2, 0) == {"accuracy_epoch": 0.625}
    assert rows(training) == [(2, {"epoch": 0, "accuracy_step": 0.25, "accuracy_epoch": 0.625})]
    assert accuracy.update_count == 0


def test_a_collection_is_logged_by_its_items(training):
    metrics = torchmetrics.MetricCollection([torchmetrics.MeanSquaredError(), torchmetrics.MeanAbsoluteError()])
    for guess in (1.0, 3.0):
        metrics(torch.tensor([guess]), torch.tensor([0.0]))
        for name, metric in metrics.items():
            training.log(name, metric, on_step=True, on_epoch=True)
    training.reduce_epoch()
    assert training.send_epoch(2, 0) == {"MeanSquaredError_epoch": 5.0, "MeanAbsoluteError_epoch": 2.0}
    assert rows(training)[0][1]["MeanSquaredError_step"] == 9.0
    assert metrics["MeanSquaredError"].update_count == 0


def test_an_updated_object_gives_what_its_updates_come_to(training):
    metric = torchmetrics.MeanMetric()
    for value in (1.0, 3.0):
        metric.update(value)
        training.log("mean", metric, on_step=True, on_epoch=True)
        assert training.callback_metrics["mean_step"] == (1.0 if value == 1.0 else 2.0)
        training.flush_step(1, 0)
    assert training.send_epoch(2, 0) == {"mean_epoch": 2.0}


def test_an_object_that_computes_several_values_is_refused(training):
    metric = torchmetrics.classification.MulticlassAccuracy(num_classes=3, average="none")
    metric.update(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]))
    training.log("per_class", metric, on_step=False, on_epoch=True)
    with pytest.raises(ConfigurationError, match=r"one real number as the value of 'per_class'.*shape \(3,\)"):
        training.reduce_epoch()


# ---------------------------------------------------------------- several ranks


class Ranks(Collectives):
    """Two ranks that log the same; the other one has what `other` says, by the kind of reduction."""

    world_size = 2

    def __init__(self, other):
        self.calls, self.other = [], other

    def _exchange(self, row):
        return torch.stack([row, row])

    def all_reduce(self, tensor, op="mean", *, met=False):
        self.calls.append((op, tensor.tolist()))
        both = torch.stack([tensor, torch.tensor(self.other[op], dtype=tensor.dtype)])
        return {"sum": both.sum(0), "max": both.amax(0)}[op]


def test_sync_dist_weights_the_ranks_by_what_they_have_seen():
    ranks = Ranks({"sum": [40.0, 5.0, 2.0, 1.0], "max": [7.0, -0.5]})
    log = make(every=5, ranks=ranks)
    with log.stage("validate"):
        log.hook("validation_step")
        for value, size in ((1.0, 4), (2.0, 2)):
            log.log("max", torch.tensor(value), sync_dist=True, reduce_fx="max")
            log.log("mean", torch.tensor(value), sync_dist=True, batch_size=size)
            log.log("min", torch.tensor(value), sync_dist=True, reduce_fx="min")
            log.log("sum", torch.tensor(value), sync_dist=True, reduce_fx="sum")
            log.log("local", torch.tensor(value), batch_size=size)
            log.log("zero", torch.tensor(value), sync_dist=True, rank_zero_only=True, reduce_fx="sum")
        log.reduce_epoch()
        results = log.send_epoch(0, 0)
    assert ranks.calls == [("sum", [8.0, 3.0, 6.0, 1.0]), ("max", [2.0, -1.0])]
    expected = {"mean": 48.0 / 8.0, "sum": 8.0, "max": 7.0, "min": 0.5, "local": pytest.approx(8 / 6), "zero": 3.0}
    assert results == expected


def test_sync_dist_of_step_values_happens_at_log_points_only():
    ranks = Ranks({"sum": [4.0, 1.0]})
    log = make(every=2, ranks=ranks)
    with log.stage("train"):
        log.hook("training_step")
        for step in (1, 2, 3):
            log.log("loss", torch.tensor(2.0 * step), sync_dist=True)
            if step == 1:
                assert "loss" not in log.callback_metrics
                with pytest.raises(KeyError, match=r"'loss' after it was reduced over the ranks") as caught:
                    log.callback_metrics["loss"]
                says(caught.value)
            log.flush_step(step, 0)
        assert log.callback_metrics["loss"] == 4.0  # not the local 6 of the third step
        log.log("loss", torch.tensor(8.0), sync_dist=True)
        log.reduce_now("loss")
        assert log.callback_metrics["loss"] == 6.0
    assert ranks.calls == [("sum", [4.0, 1.0]), ("sum", [8.0, 1.0])]
    assert rows(log) == [(2, {"epoch": 0, "loss": 4.0})]


# ---------------------------------------------------------------- what is refused

REFUSED = {
    "several elements": (
        "training_step",
        lambda log: log.log("v", torch.zeros(3)),
        r"one real number as the value of 'v'. Received: a torch.float32 tensor of shape \(3,\)",
    ),
    "text": ("training_step", lambda log: log.log("v", "high"), r"Received: 'high' \(str\)"),
    "None": ("training_step", lambda log: log.log("v", None), r"NoneType"),
    "dict": ("training_step", lambda log: log.log("v", {"a": 1.0}), r"self.log_dict"),
    "complex": ("training_step", lambda log: log.log("v", torch.tensor(1j)), r"complex64"),
    "name": ("training_step", lambda log: log.log(3, 1.0), r"a str as the name of a metric. Received: 3"),
    "suffix": ("validation_step", lambda log: log.log("v/dataloader_idx_0", 1.0), r"which is added for you"),
    "no level": (
        "training_step",
        lambda log: log.log("v", 1.0, on_step=False),
        r"at least one of on_step and on_epoch.*on_step=False, on_epoch=False\) in training_step",
    ),
    "step value of an epoch hook": (
        "on_train_epoch_end",
        lambda log: log.log("v", 1.0, on_step=True),
        r"on_step=False and on_epoch=True in a hook that runs once per epoch",
    ),
    "reduction": ("training_step", lambda log: log.log("v", 1.0, reduce_fx="median"), r"reduce_fx='median'"),
    "function over ranks": (
        "validation_step",
        lambda log: log.log("v", 1.0, reduce_fx=second_largest, sync_dist=True),
        r"with sync_dist=True",
    ),
    "batch size": (
        "validation_step",
        lambda log: log.log("v", 1.0, batch_size=torch.tensor(2)),
        r"an int as batch_size, of at least 1. Received: batch_size=tensor\(2\)",
    ),
    **{
        f"batch size {size}": (
            "validation_step",
            lambda log, s=size: log.log("v", 1.0, batch_size=s),
            f"batch_size={size}",
        )
        for size in (0, -1, True, 2.0)
    },
    "name of the x-axis": (
        "training_step",
        lambda log: log.log("step", 1.0),
        r"than 'step' or 'epoch'.*self.log\('my_step'",
    ),
    "name of the epochs": ("on_train_epoch_end", lambda log: log.log("epoch", 1.0), r"self.log\('my_epoch'"),
    "empty name": ("training_step", lambda log: log.log("", 1.0), r"a str as the name of a metric. Received: ''"),
    **{
        f"{switch} that is no switch": (
            "training_step",
            lambda log, s=switch, v=value: log.log("v", 1.0, **{s: v}),
            rf"True or False as {switch}. Received: {switch}={value!r}",
        )
        for switch, value in {
            "on_step": "no",
            "on_epoch": 1,
            "sync_dist": "x",
            "prog_bar": None,
            "logger": None,
            "rank_zero_only": "no",
        }.items()
    },
    "misspelt option": (
        "training_step",
        lambda log: log.log("v", 1.0, onstep=True),
        r"Received: onstep.\nFix:.*on_step=",
    ),
    "list": ("training_step", lambda log: log.log_dict([1.0]), r"metrics by name. Received: \[1.0\] \(list\)"),
    "no dict": ("training_step", lambda log: log.log_dict(None), r"metrics by name. Received: None"),
    "huge int": ("training_step", lambda log: log.log("v", 10**400), r"that fits a float"),
    "hook": ("on_fit_start", lambda log: log.log("v", 1.0), r"self.log\('v', ...\) in on_fit_start"),
    "changed settings": (
        "training_step",
        lambda log: (log.log("v", 1.0), log.log("v", 1.0, prog_bar=True)),
        r"the same settings each time 'v' is logged.*prog_bar=True after prog_bar=False",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    hook, call, message = REFUSED[case]
    log = make()
    with log.stage("train"):
        log.hook(hook)
        with pytest.raises(ConfigurationError, match=re.compile(message, re.DOTALL)) as raised:
            call(log)
    assert "Expected" in str(raised.value)
    assert "Fix:" in str(raised.value)


def test_a_bad_value_after_a_good_one_is_refused(training):
    training.log("v", torch.tensor(1.0))
    with pytest.raises(ConfigurationError, match=r"shape \(2,\)"):
        training.log("v", torch.zeros(2))
    training.flush(1, 0)
    assert rows(training) == [(1, {"epoch": 0, "v": 1.0})]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_complex_value_after_a_real_one_is_refused(asynchronous):
    log = make(asynchronous=asynchronous)
    with log.stage("train"):
        log.hook("training_step")
        log.log("v", torch.tensor(1.0))
        with pytest.raises(ConfigurationError, match="complex64"):
            log.log("v", torch.tensor(1j))


@pytest.mark.parametrize("result", ["text", torch.zeros(2), None])
def test_a_reduction_that_returns_no_number_is_refused(training, result):
    training.log("v", 1.0, on_step=False, on_epoch=True, reduce_fx=lambda values: result)
    with pytest.raises(ConfigurationError, match="one real number as the value of 'v'"):
        training.reduce_epoch()


def test_an_empty_tensor_in_a_batch_gives_no_weight(training):
    training.set_batch({"masks": torch.zeros(0, 3), "x": torch.zeros(4, 3)})
    training.log("v", 3.0, on_step=False, on_epoch=True)
    training.set_batch(torch.zeros(0))
    training.log("v", 8.0, on_step=False, on_epoch=True)
    training.reduce_epoch()
    assert training.callback_metrics["v"] == (4 * 3.0 + 8.0) / 5


def test_logging_outside_of_the_loop_is_refused():
    log = make()
    log.hook("training_step")
    with pytest.raises(ConfigurationError, match=r"self\.log\('v', \.\.\.\) in training_step"):
        log.log("v", 1.0)


def test_two_loaders_with_one_name_are_refused():
    log = make()
    with log.stage("validate"):
        log.hook("validation_step")
        log.set_batch(torch.zeros(2), 0)
        log.log("loss", 1.0, add_dataloader_idx=False)
        log.set_batch(torch.zeros(2), 1)
        with pytest.raises(ConfigurationError, match="'loss' from loader 0 and loader 1"):
            log.log("loss", 1.0, add_dataloader_idx=False)


@pytest.mark.parametrize("every", [-1, 2.5, True, None])
def test_log_every_n_steps_is_checked(every):
    with pytest.raises(ConfigurationError, match="log_every_n_steps"):
        make(every)


# ---------------------------------------------------------------- in a Trainer


class Digits(LightningModule):
    """Logs from every hook that may log."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = torch.nn.Linear(2, 3)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(num_classes=3, average="micro")
        self.losses, self.monitored = [], []

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)]

    def on_train_start(self):
        self.log("begun", 1.0)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.manual_backward(loss)
        self.log("norm", self.clip_gradients(optimizer, 1.0, "norm"))
        optimizer.step()
        self.log_dict({"loss": loss}, on_step=True, on_epoch=True, prog_bar=True)
        self.losses.append((loss.item(), len(batch[1])))

    def on_train_epoch_end(self):
        self.monitored.append(self.trainer.callback_metrics["loss"].item())
        self.lr_schedulers().step(self.trainer.callback_metrics["loss"])
        self.log("rate", self.optimizers().param_groups[0]["lr"])

    def validation_step(self, batch, batch_idx):
        prediction = self.net(batch[0])
        self.accuracy(prediction, batch[1])
        self.log("accuracy", self.accuracy)
        self.log("val_loss", torch.nn.functional.cross_entropy(prediction, batch[1]))

    def on_validation_epoch_end(self):
        self.log("error", 1 - self.trainer.callback_metrics["accuracy"])


def digits():
    data = torch.utils.data.TensorDataset(torch.randn(10, 2), torch.randint(3, (10,)))
    return torch.utils.data.DataLoader(data, batch_size=4)


def fit(**options):
    trainer = Trainer("cpu", max_epochs=2, enable_progress_bar=False, logger=Recorder(), **options)
    module, data = Digits(), digits()
    trainer.fit(module, data, data)
    return trainer, module, data


def test_a_training_reads_at_log_points_and_epoch_ends_only(monkeypatch):
    sizes = []
    read = Backend.read_scalars
    monkeypatch.setattr(Backend, "read_scalars", lambda self, values: sizes.append(len(values)) or read(self, values))
    cpu = type(Trainer("cpu").backend)
    monkeypatch.setattr(cpu, "capabilities", replace(cpu.capabilities, asynchronous=True))  # as devices that queue work
    trainer, _, _ = fit(log_every_n_steps=2, num_sanity_val_steps=0, nonfinite_loss="ignore")
    # step 2: norm and 2 losses; validation: 2 losses at its log point, accuracy and a loss at its end, error; step 3
    first = [3, 2, 2, 1, 2]
    second = [2, 3, 2, 2, 1]  # step 4; steps 5 and 6; validation as before; nothing is left for the end of training
    assert sizes == first + second
    assert [step for step, row in trainer.logger.rows if "norm" in row] == [1, 2, 3, 5]


def test_epoch_values_of_a_training_are_those_of_all_its_batches():
    trainer, module, data = fit()
    for epoch in range(2):
        losses = module.losses[3 * epoch : 3 * epoch + 3]
        mean = sum(loss * size for loss, size in losses) / sum(size for _, size in losses)
        assert module.monitored[epoch] == pytest.approx(mean, rel=1e-6)
    epochs = [row for _, row in trainer.logger.rows if "rate" in row]
    assert [row["rate"] for row in epochs] == [pytest.approx(0.01), pytest.approx(0.001)]
    assert [row["loss_epoch"] for row in epochs] == pytest.approx(module.monitored)
    assert epochs[0]["begun"] == 1.0

    with torch.no_grad():
        logits, target = module.net(data.dataset.tensors[0]), data.dataset.tensors[1]
    right = (logits.argmax(1) == target).float().mean().item()
    (results,) = trainer.validate(module, data)
    assert results == {
        "accuracy": pytest.approx(right),
        "val_loss": pytest.approx(torch.nn.functional.cross_entropy(logits, target).item(), rel=1e-6),
        "error": pytest.approx(1 - right),
    }


def test_logging_in_a_hook_of_no_epoch_is_refused():
    class Early(Digits):
        def on_fit_start(self):
            self.log("x", 1.0)

    with pytest.raises(ConfigurationError, match=r"self\.log\('x', \.\.\.\) in on_fit_start"):
        Trainer("cpu", max_epochs=1, enable_progress_bar=False).fit(Early(), digits())
