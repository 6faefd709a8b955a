"""The callbacks that everybody uses, each against a count or a loop written by hand."""

from __future__ import annotations

import copy
import math
import re
from datetime import timedelta

import pytest
import torch
from small import Small, assert_equal, loader, net, plain, rows, says, square, trained, trainer

from xtrain import Callback, ConfigurationError, ProtocolError
from xtrain.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LambdaCallback,
    LearningRateMonitor,
    ModelSummary,
    Timer,
    WeightAveraging,
)
from xtrain.loggers import CSVLogger
from xtrain.testing.ranks import Ranks


class Scripted(Small):
    """Logs given values, one per epoch, in `hook`."""

    def __init__(self, values, hook="on_train_epoch_end"):
        super().__init__()
        self.values = values
        setattr(self, hook, self.say)

    def say(self, *_):
        self.log("score", self.values[self.trainer.current_epoch])


# ---------------------------------------------------------------- EarlyStopping


@pytest.mark.parametrize(
    ("values", "options", "epochs"),
    [
        ([3.0, 2.0, 2.5, 2.5, 1.0, 1.0], {"patience": 2}, 4),
        ([3.0, 2.0, 1.9, 1.8, 1.0, 1.0], {"patience": 2, "min_delta": 0.5}, 4),
        ([1.0, 2.0, 1.5, 1.5, 3.0, 1.0], {"patience": 2, "mode": "max"}, 4),
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], {"patience": 5}, 6),
        ([3.0, math.nan, 1.0, 1.0, 1.0, 1.0], {}, 2),
        ([3.0, math.nan, 1.0, 1.0, 1.0, 1.0], {"check_finite": False, "patience": 9}, 6),
        ([3.0, 0.4, 1.0, 1.0, 1.0, 1.0], {"stopping_threshold": 0.5}, 2),
        ([3.0, 9.0, 1.0, 1.0, 1.0, 1.0], {"divergence_threshold": 5.0}, 2),
    ],
)
@pytest.mark.parametrize("hook", ["on_train_epoch_end", "validation_step"])
def test_training_ends_when_a_metric_no_longer_improves(values, options, epochs, hook):
    stop, validate = EarlyStopping("score", **options), loader(1) if hook == "validation_step" else None
    _, run = trained(module=Scripted(values, hook), validate=validate, callbacks=stop, max_epochs=6)
    assert run.current_epoch == epochs
    assert bool(stop.reason) is run.should_stop is (stop.reason != "")


def test_a_value_logged_over_steps_is_that_of_the_whole_epoch():
    class Steps(Small):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.log("score", float(batch_idx), on_epoch=True)

    stop = EarlyStopping("score")
    trained(module=Steps(), callbacks=stop)
    assert stop.best_score == 1.5


def test_a_metric_that_was_never_logged_is_named():
    with pytest.raises(ConfigurationError) as caught:
        trained(callbacks=EarlyStopping("val_los"))
    says(caught.value, "'val_los'", "strict=False")
    assert trained(callbacks=EarlyStopping("val_los", strict=False), max_epochs=2)[1].current_epoch == 2
    with pytest.raises(ConfigurationError, match="mode 'min' or 'max'"):
        EarlyStopping("loss", mode="lowest")


def test_where_validations_are_rare_they_are_counted_not_epochs():
    stop = EarlyStopping("score", patience=2)
    module = Scripted([5.0] * 20, "validation_step")
    _, run = trained(module=module, validate=loader(1), callbacks=stop, max_epochs=20, check_val_every_n_epoch=3)
    assert run.current_epoch == 9


def test_patience_survives_a_checkpoint():
    stop = EarlyStopping("score", patience=3)
    trained(module=Scripted([1.0, 2.0, 2.0]), callbacks=stop, max_epochs=3)
    later = EarlyStopping("score", patience=9)
    later.load_state_dict(stop.state_dict())
    assert trained(module=Scripted([2.0] * 9), callbacks=later, max_epochs=9)[1].current_epoch == 1


def stopped(world_size, rank):
    class Uneven(Small):
        def on_train_epoch_end(self):
            self.log("score", 1.0 if self.global_rank == 0 else 1.0 - self.current_epoch)

    _, run = trained(module=Uneven(), callbacks=EarlyStopping("score", patience=2), max_epochs=9)
    timer = Timer({"seconds": 0.05 + 1000 * rank}, verbose=False)
    _, timed = trained(callbacks=timer, max_steps=10**6, max_epochs=-1)
    return run.current_epoch, timed.global_step


def test_ranks_that_see_different_values_stop_in_the_same_step():
    ranks = Ranks(2)
    try:
        first, second = ranks.run(stopped)
    finally:
        ranks.close()
    assert first == second
    assert first[0] == 3
    assert first[1] < 10**6


# ---------------------------------------------------------------- order and logging


def test_a_callback_that_watches_the_module_runs_after_it():
    order = []

    class Watching(Callback):
        after_module = True

        def on_train_epoch_end(self, trainer, module):
            order.append(("watching", float(trainer.callback_metrics["late"])))

    class Module(Small):
        def on_train_epoch_end(self):
            self.log("late", 5.0)
            order.append("module")

    before = LambdaCallback(on_train_epoch_end=lambda trainer, module: order.append("before"))
    trained(module=Module(), callbacks=[Watching(), before])
    assert order == ["before", "module", ("watching", 5.0)]


def test_a_callback_logs_as_the_module_does():
    class Logging(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.log("steps", float(batch_idx), on_step=False, on_epoch=True)

        def on_train_epoch_end(self, trainer, module):
            self.log_dict({"a": 1.0, "b": torch.tensor(2.0)})

    callback = Logging()
    _, run = trained(callbacks=callback)
    assert {k: float(run.callback_metrics[k]) for k in ("steps", "a", "b")} == {"steps": 1.5, "a": 1.0, "b": 2.0}
    with pytest.raises(ProtocolError, match="inside of a run"):
        callback.log("a", 1.0)


def test_hooks_may_be_functions():
    seen = []
    trained(callbacks=LambdaCallback(on_train_batch_end=lambda trainer, module, out, batch, index: seen.append(index)))
    assert seen == [0, 1, 2, 3]
    for wrong in ({"on_train_epoch_ends": print}, {"on_train_end": 3}, {"log": print}):
        with pytest.raises(ConfigurationError) as caught:
            LambdaCallback(**wrong)
        says(caught.value, "LambdaCallback(")


# ---------------------------------------------------------------- learning rates


class Scheduled(Small):
    def __init__(self, interval="epoch"):
        super().__init__()
        self.automatic_optimization = True
        self.interval = interval

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([{"params": [self.net.weight]}, {"params": [self.net.bias], "lr": 0.5}], lr=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": self.interval}}


@pytest.mark.parametrize(("interval", "rates"), [("epoch", [0.1, 0.05]), ("step", [0.1, 0.05, 0.025, 0.0125])])
def test_learning_rates_are_logged_as_they_were_used(tmp_path, interval, rates):
    logger = CSVLogger(tmp_path)
    sent = []
    logger.log_metrics = lambda metrics, step: sent.append(metrics)
    monitor = LearningRateMonitor(log_momentum=True, log_weight_decay=True)
    options = {"max_epochs": 2, "limit_train_batches": 2, "log_every_n_steps": 1}
    trained(module=Scheduled(interval), callbacks=monitor, logger=logger, **options)
    found = [row for row in sent if "lr-SGD/pg1" in row]
    assert [row["lr-SGD/pg1"] for row in found] == pytest.approx(rates)
    assert [row["lr-SGD/pg2"] for row in found] == pytest.approx([5 * rate for rate in rates])
    assert {row["lr-SGD/pg1-momentum"] for row in found} == {row["lr-SGD/pg2-weight_decay"] for row in found} == {0}


def test_two_optimizers_of_one_class_are_told_apart(tmp_path):
    class Two(Small):
        def training_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return [torch.optim.Adam([p], lr=r) for p, r in zip(self.net.parameters(), (0.1, 0.2), strict=True)]

    _, run = trained(module=Two(), callbacks=LearningRateMonitor(log_momentum=True), logger=CSVLogger(tmp_path))
    rates = {name: float(value) for name, value in run.callback_metrics.items()}
    expected = {"lr-Adam": 0.1, "lr-Adam-1": 0.2, "lr-Adam-momentum": 0.9, "lr-Adam-1-momentum": 0.9}
    assert rates == pytest.approx(expected)


def test_learning_rates_that_go_nowhere_are_refused():
    with pytest.raises(ConfigurationError, match="a logger beside LearningRateMonitor"):
        trained(callbacks=LearningRateMonitor())
    with pytest.raises(ConfigurationError, match="'step', 'epoch' or None"):
        LearningRateMonitor("batch")


# ---------------------------------------------------------------- Timer


def test_a_timer_ends_the_training_in_the_middle_of_an_epoch(capsys):
    class Slow(Small):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            clock.seconds += 10.0

    clock = Clock()
    timer = Timer(timedelta(seconds=25))
    with clock:
        module, run = trained(module=Slow(), callbacks=timer, max_epochs=5)
        assert timer.time_elapsed() == 30.0
        assert timer.time_remaining() == -5.0
    assert module.seen == [0, 1, 2]
    assert "Timer ends the training after 0:00:30, in epoch 0." in capsys.readouterr().out
    later = Timer("00:00:01:00", interval="epoch")
    later.load_state_dict(timer.state_dict())
    with clock:
        assert trained(module=Slow(), callbacks=later, max_epochs=5)[1].current_epoch == 1
    assert run.should_stop


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("time.monotonic", lambda: self.seconds)

    def __exit__(self, *_):
        self.patch.undo()


def test_durations_have_several_forms():
    forms = ["01:02:03:04", {"days": 1, "hours": 2, "minutes": 3, "seconds": 4}, timedelta(seconds=93784)]
    assert {Timer(form).time_remaining() for form in forms} == {93784.0}
    assert Timer().time_remaining() is None
    for wrong in ("12:00", "00:00:00:00", {"hour": 1}, 5):
        with pytest.raises(ConfigurationError) as caught:
            Timer(wrong)
        says(caught.value, "DD:HH:MM:SS")
    with pytest.raises(ConfigurationError, match="interval 'step' or 'epoch'"):
        Timer(interval="batch")


# ---------------------------------------------------------------- ModelSummary


@pytest.mark.filterwarnings("ignore:Expected every layer in train mode")
def test_the_summary_counts_parameters_by_child(capsys):
    class Deep(Small):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Sequential(torch.nn.Linear(300, 1000), torch.nn.BatchNorm1d(1000)).eval()
            self.body[0].weight.requires_grad_(False)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    trained(module=Deep(), callbacks=ModelSummary(max_depth=2))
    out = capsys.readouterr().err
    table = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert table["net"] == ["Linear", "4", "4", "train"]
    assert table["body"] == ["Sequential", "303,000", "3,000", "eval"]
    assert table["body.0"] == ["Linear", "301,000", "1,000", "eval"]
    assert "303,004 parameters (3,004 trainable, 300,000 frozen)\n1.2 MB on cpu (cpu, 32-true): 1.2 parameters" in out
    trained(module=Deep(), callbacks=ModelSummary(max_depth=0), precision="bf16-true")
    out = capsys.readouterr().err
    assert "0.6 MB on cpu" in out
    assert len(out.splitlines()) == 3  # the line of the run before it
    with pytest.raises(ConfigurationError, match="max_depth"):
        ModelSummary(max_depth=-2)


def test_parameters_that_do_not_exist_yet_are_said(capsys):
    class Lazy(Small):
        def __init__(self):
            super().__init__()
            self.lazy = torch.nn.LazyLinear(2)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    trained(module=Lazy(), callbacks=ModelSummary())
    assert re.search(r"lazy +LazyLinear +0 .*\n4 parameters .* and 2 that the first", capsys.readouterr().err)


# ---------------------------------------------------------------- averages of the weights


class WithBuffer(Small):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)
        self.validated = []

    def loss(self, batch):
        return self.net(self.norm(batch)).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append(copy.deepcopy(self.net.state_dict()))


def ema_by_hand(decay, from_step=0, dtype=torch.float32):
    """Train as `Small` does, and average by two lines; returns the network, the average, and the average per epoch."""
    average, epochs, step = net().to(dtype).float(), [], 0

    def update(layer, optimizer, batch, index):
        nonlocal step, begun
        optimizer.zero_grad()
        square(layer, batch).backward()
        optimizer.step()
        if step >= from_step:
            for mean, new in zip(average.parameters(), layer.parameters(), strict=True):
                mean.data = decay * mean.data + (1 - decay) * new.data if begun else new.data.clone()
            begun = True
        step += 1
        if index == 3:
            epochs.append(copy.deepcopy(average.state_dict()))

    begun = False
    return plain(update, epochs=2), average, epochs


@pytest.mark.parametrize("from_step", [0, 3])
def test_an_exponential_average_is_validated_and_left_in_the_module(from_step):
    class Validated(Small):
        validated = []

        def validation_step(self, batch, batch_idx):
            self.validated.append(copy.deepcopy(self.net.state_dict()))

    _, average, epochs = ema_by_hand(0.7, from_step)
    ema = EMAWeightAveraging(decay=0.7, update_starting_at_step=from_step)
    module = Validated()
    module.validated = []
    trained(module=module, validate=loader(1), max_epochs=2, callbacks=ema, num_sanity_val_steps=0)
    assert_equal(module.net, average)
    for ours, theirs in zip(module.validated, epochs, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_training_itself_goes_on_with_its_own_weights():
    class Validated(Small):
        def validation_step(self, batch, batch_idx):
            pass

    weights = []
    end = LambdaCallback(on_train_end=lambda trainer, module: weights.extend(p.clone() for p in module.parameters()))
    trained(module=Validated(), validate=loader(1), max_epochs=2, callbacks=[end, EMAWeightAveraging(decay=0.7)])
    for ours, theirs in zip(weights, ema_by_hand(0.7)[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_plain_mean_over_epochs():
    class Epochs(WeightAveraging):
        def should_update(self, step_idx=None, epoch_idx=None):
            return epoch_idx is not None

    seen = []
    note = LambdaCallback(on_train_epoch_end=lambda t, m: seen.append([p.detach().clone() for p in m.parameters()]))
    module, _ = trained(max_epochs=3, callbacks=[note, Epochs()])
    for index, parameter in enumerate(module.parameters()):
        torch.testing.assert_close(parameter, sum(epoch[index] for epoch in seen) / 3)


def test_running_statistics_are_averaged_only_if_asked_for():
    for use_buffers in (True, False):
        means = []
        end = LambdaCallback(on_train_batch_end=lambda t, m, *_: means.append(m.norm.running_mean.clone()))  # noqa: B023
        module, _ = trained(
            module=WithBuffer(), callbacks=[end, EMAWeightAveraging(use_buffers=use_buffers, decay=0.5)]
        )
        expected = means[0]
        for mean in means[1:]:
            expected = (expected + mean) / 2
        torch.testing.assert_close(module.norm.running_mean, expected if use_buffers else means[-1])


def test_the_average_of_low_precision_weights_is_kept_in_32_bits():
    class Still(Small):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            with torch.no_grad():
                self.net.weight.fill_(1.0 if batch_idx else 0.0)

    ema = EMAWeightAveraging(decay=0.999)
    seen = []
    note = LambdaCallback(on_train_end=lambda t, m: seen.append(next(ema._average.module.parameters()).clone()))
    trained(loader(40), Still(), precision="bf16-true", callbacks=[note, ema])
    torch.testing.assert_close(seen[0], torch.full((1, 3), 1 - 0.999**39))


def test_a_validation_that_fails_gives_the_weights_back():
    class Broken(Small):
        def validation_step(self, batch, batch_idx):
            raise KeyError("broken")

    module = Broken()
    with pytest.raises(KeyError):
        trained(module=module, validate=loader(1), callbacks=EMAWeightAveraging(decay=0.5), num_sanity_val_steps=0)
    by_hand = Small()
    trained(module=by_hand)
    assert_equal(module.net, by_hand.net)
    assert rows(1).shape == (1, 3)
    assert trainer().current_epoch == 0


def test_an_average_goes_on_from_a_checkpoint():
    ema, states = EMAWeightAveraging(decay=0.7), []
    note = LambdaCallback(on_train_epoch_end=lambda t, m: states.append((ema.state_dict(), copy.deepcopy(m.net))))
    whole, _ = trained(max_epochs=2, callbacks=[note, ema])
    state, layer = states[0]
    assert int(state["n_averaged"]) == 4
    resumed, module = EMAWeightAveraging(decay=0.7), Small()
    module.net.load_state_dict(layer.state_dict())
    resumed.load_state_dict(state)
    trained(module=module, callbacks=resumed)
    assert_equal(module.net, whole.net)
    assert EMAWeightAveraging().state_dict() == {}
