"""Every form of ``configure_optimizers``, and every way to get it wrong."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from small import Automatic, Small, loader, net, rows, says, trainer
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR

from xtrain import ConfigurationError, LightningOptimizer, ProtocolError
from xtrain.configure import LRSchedulerConfig, read_optimizers


def sgd(layer=None, lr=0.1):
    return torch.optim.SGD((layer or net()).parameters(), lr=lr)


A, B = sgd(), sgd()
SCHEDULE_A, SCHEDULE_B = StepLR(A, 1), ExponentialLR(B, 0.5)
PLATEAU = ReduceLROnPlateau(A)


# ---------------------------------------------------------------- accepted forms


@pytest.mark.parametrize(
    ("returned", "optimizers", "schedulers"),
    [
        (None, [], []),
        (A, [A], []),
        ([A], [A], []),
        ((A,), [A], []),
        ([A, B], [A, B], []),
        ((B, A), [B, A], []),
        (([A], []), [A], []),
        (([A, B], [SCHEDULE_B]), [A, B], [SCHEDULE_B]),
        ([[A, B], [SCHEDULE_A, SCHEDULE_B]], [A, B], [SCHEDULE_A, SCHEDULE_B]),
        (((A,), (SCHEDULE_A,)), [A], [SCHEDULE_A]),
        (([A], [{"scheduler": SCHEDULE_A, "interval": "step"}]), [A], [SCHEDULE_A]),
        ({"optimizer": A}, [A], []),
        ({"optimizer": A, "lr_scheduler": None}, [A], []),
        ({"optimizer": A, "lr_scheduler": SCHEDULE_A}, [A], [SCHEDULE_A]),
        ({"optimizer": A, "lr_scheduler": {"scheduler": SCHEDULE_A}}, [A], [SCHEDULE_A]),
        ([{"optimizer": A, "lr_scheduler": SCHEDULE_A}, {"optimizer": B}], [A, B], [SCHEDULE_A]),
        (({"optimizer": A}, {"optimizer": B, "lr_scheduler": {"scheduler": SCHEDULE_B}}), [A, B], [SCHEDULE_B]),
        ([A, {"optimizer": B, "lr_scheduler": SCHEDULE_B, "frequency": 1}], [A, B], [SCHEDULE_B]),
        (LightningOptimizer(A), [A], []),
        ([LightningOptimizer(A), LightningOptimizer(B)], [A, B], []),
        (([LightningOptimizer(A)], [SCHEDULE_A]), [A], [SCHEDULE_A]),
        ({"optimizer": LightningOptimizer(A), "lr_scheduler": SCHEDULE_A}, [A], [SCHEDULE_A]),
    ],
)
def test_accepted_form(returned, optimizers, schedulers):
    found, configs = read_optimizers(returned)
    assert [id(o) for o in found] == [id(o) for o in optimizers]
    assert [id(config.scheduler) for config in configs] == [id(s) for s in schedulers]


def test_an_optimizer_wrapped_by_hand_takes_no_part_in_a_run():
    with pytest.raises(ProtocolError) as caught:
        LightningOptimizer(sgd()).step()
    says(caught.value, "self.optimizers()")


def test_scheduler_settings_default_to_lightnings():
    (config,) = read_optimizers(([A], [SCHEDULE_A]))[1]
    assert config == LRSchedulerConfig(SCHEDULE_A, "epoch", 1, None, True, None, False)


def test_scheduler_settings_are_kept():
    settings = {"interval": "step", "frequency": 3, "monitor": "val", "strict": False, "name": "decay"}
    (config,) = read_optimizers({"optimizer": A, "lr_scheduler": {"scheduler": SCHEDULE_A, **settings}})[1]
    assert config == LRSchedulerConfig(SCHEDULE_A, **settings)


@pytest.mark.parametrize(
    "returned",
    [
        {"optimizer": A, "lr_scheduler": PLATEAU, "monitor": "val"},
        {"optimizer": A, "lr_scheduler": {"scheduler": PLATEAU, "monitor": "val"}},
    ],
)
def test_plateau_is_recognised_and_finds_its_metric(returned):
    (config,) = read_optimizers(returned)[1]
    assert config.reduce_on_plateau
    assert config.monitor == "val"


def test_schedule_need_not_derive_from_torchs():
    class Warmup:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self): ...

    warmup = Warmup(A)
    assert read_optimizers(([A], [warmup]))[1][0].scheduler is warmup


def test_one_parameter_may_belong_to_two_optimizers():
    layer = net()
    assert len(read_optimizers([sgd(layer), sgd(layer)])[0]) == 2


# ---------------------------------------------------------------- nonsense


@pytest.mark.parametrize(
    ("returned", "culprit"),
    [
        (3, "the returned value is int: 3"),
        ("adam", "the returned value is str: 'adam'"),
        (SCHEDULE_A, "the returned value is StepLR"),
        ((o for o in [A]), "the returned value is generator"),
        (torch.optim.SGD, "the returned value is type"),
        ([A, 3], "item 1 is int: 3"),
        ([A, SCHEDULE_A], "item 1 is StepLR"),
        ([A, None], "item 1 is NoneType"),
        (([A, "b"], [SCHEDULE_A]), "item 1 of the list of optimizers is str: 'b'"),
        (([A], [7]), "item 0 of the list of schedulers, the scheduler, is int: 7"),
        (([A], [A]), "item 0 of the list of schedulers, the scheduler, is SGD"),
        (([A], [{"interval": "step"}]), "item 0 of the list of schedulers, the scheduler, is NoneType"),
        ({}, "item 0['optimizer'] is NoneType"),
        ({"optimizer": net()}, "item 0['optimizer'] is Linear"),
        ({"optimizer": A, "scheduler": SCHEDULE_A}, "item 0, keys ['scheduler'], is dict"),
        ([A, {"optimizer": B, "lr_scheduler": "cosine"}], "item 1['lr_scheduler'], the scheduler, is str: 'cosine'"),
    ],
)
def test_nonsense_is_named_with_its_type_and_what_is_accepted(returned, culprit):
    with pytest.raises(ConfigurationError) as caught:
        read_optimizers(returned)
    says(caught.value, culprit, "a dict with 'optimizer'", "(list of optimizers, list of schedulers)")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"intervall": "step"}, ("intervall", "interval, frequency, monitor")),
        ({"interval": "batch"}, ("'epoch' or 'step'", "'batch'")),
        ({"frequency": 0}, ("frequency of at least 1", "Received: 0")),
        ({"frequency": 0.5}, ("frequency of at least 1", "Received: 0.5")),
    ],
)
def test_wrong_scheduler_setting(settings, parts):
    with pytest.raises(ConfigurationError) as caught:
        read_optimizers(([A], [{"scheduler": SCHEDULE_A, **settings}]))
    says(caught.value, "item 0 of the list of schedulers", *parts)


@pytest.mark.parametrize("returned", [([A], [SCHEDULE_B]), {"optimizer": A, "lr_scheduler": SCHEDULE_B}])
def test_scheduler_of_an_optimizer_that_was_not_returned(returned):
    with pytest.raises(ConfigurationError) as caught:
        read_optimizers(returned)
    says(caught.value, "a ExponentialLR of a SGD that is not returned")


def test_equal_optimizers_are_told_apart_by_identity():
    layer = net()
    returned, forgotten = sgd(layer), sgd(layer)
    with pytest.raises(ConfigurationError, match="not returned"):
        read_optimizers(([returned], [StepLR(forgotten, 1)]))


def test_parameter_twice_in_one_optimizer():
    layer = net()
    optimizer = sgd(net())
    # torch checks its constructor only; a group changed afterwards gets past it.
    optimizer.param_groups[0]["params"] += [layer.weight, layer.bias, layer.weight]
    with pytest.raises(ConfigurationError) as caught:
        read_optimizers([A, optimizer])
    says(caught.value, "optimizer 1 (SGD)", "parameter 4 of group 0, shape (1, 3)")


def test_parameter_in_two_groups_of_one_optimizer():
    layer = net()
    optimizer = torch.optim.SGD([{"params": [layer.weight]}, {"params": [layer.bias]}], lr=0.1)
    optimizer.param_groups[1]["params"].append(layer.weight)
    with pytest.raises(ConfigurationError) as caught:
        read_optimizers(optimizer)
    says(caught.value, "optimizer 0 (SGD)", "parameter 1 of group 1")


# ---------------------------------------------------------------- through the Trainer


class Returning(Small):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def configure_optimizers(self):
        return self.make(self)


@pytest.mark.parametrize("make", [lambda m: 3, lambda m: [sgd(m.net), "no"], lambda m: ([sgd(m.net)], [SCHEDULE_A])])
def test_nonsense_is_refused_before_the_first_batch_and_the_module_stays_usable(make):
    module = Returning(make)
    before = module.net.weight.clone()
    with pytest.raises(ConfigurationError):
        trainer().fit(module, loader())
    assert module.seen == []
    assert torch.equal(module.net.weight, before)
    module.make = lambda m: sgd(m.net)
    trainer().fit(module, loader())
    assert module.seen == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:Expected optimizer 1")
def test_several_optimizers_come_back_in_their_order():
    class Two(Small):
        def training_step(self, batch, batch_idx):
            self.lrs = [o.param_groups[0]["lr"] for o in self.optimizers()]
            self.raw = self.optimizers(use_pl_optimizer=False)
            self.schedules = self.lr_schedulers()

        def configure_optimizers(self):
            self.made = sgd(self.net, 0.1), sgd(net(), 0.2)
            self.steps = StepLR(self.made[1], 1), StepLR(self.made[0], 1)
            return self.made, self.steps

    module = Two()
    trainer(max_epochs=1, limit_train_batches=1).fit(module, loader())
    assert module.lrs == [0.1, 0.2]
    assert [id(o) for o in module.raw] == [id(o) for o in module.made]
    assert [id(s) for s in module.schedules] == [id(s) for s in module.steps]


@pytest.mark.filterwarnings("ignore:Expected an optimizer from")
def test_without_optimizers_the_step_still_runs():
    class Frozen(Small):
        def training_step(self, batch, batch_idx):
            self.seen.append(batch_idx)
            self.found = self.optimizers(), self.lr_schedulers()

        def configure_optimizers(self): ...

    module = Frozen()
    run = trainer()
    run.fit(module, loader(3))
    assert module.seen == [0, 1, 2]
    assert module.found == ([], None)
    assert run.global_step == 0


class OneCycle(Automatic):
    """Reads how many steps there will be, as a scheduler over a whole training has to."""

    def configure_optimizers(self):
        self.expected = self.trainer.estimated_stepping_batches
        return sgd(self.net)

    def loss(self, batch):
        return super().loss(rows(2) if batch is None else batch)


@pytest.mark.parametrize("endless", [False, True], ids=["5 batches", "endless stream"])
@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 3, "limit_train_batches": 2},
        {"max_epochs": 3, "limit_train_batches": 5, "accumulate_grad_batches": 2},
        {"max_epochs": 3, "limit_train_batches": 5, "max_steps": 7},  # in the middle of an epoch
        {"max_epochs": 3, "limit_train_batches": 5, "max_steps": 100},  # the epochs end first
        {"max_epochs": 3, "limit_train_batches": 5, "max_steps": 4, "accumulate_grad_batches": 2},
        {"max_epochs": -1, "max_steps": 7},
        {"max_steps": 7, "accumulate_grad_batches": 2},  # no number of epochs at all
        {"max_epochs": 1, "max_steps": 0},
    ],
    ids=str,
)
def test_configure_optimizers_sees_how_long_training_will_be(options, endless):
    module, run = OneCycle(), trainer(**options)
    run.fit(module, itertools.repeat(rows(2)) if endless else loader(5))
    assert module.expected == run.run.life.optimizers[0].step_count == run.global_step


@pytest.mark.parametrize("source", [None, loader(9), itertools.repeat(rows(2))], ids=["none", "9 batches", "endless"])
def test_configure_optimizers_sees_the_steps_that_fit_was_given(source):
    module, run = OneCycle(), trainer(max_epochs=None)
    run.fit(module, source, steps=7)
    assert module.expected == run.global_step == 7


def test_how_long_training_will_be_is_infinite_where_nothing_says_it():
    module = OneCycle()
    trainer(max_epochs=1).fit(module, (rows(2) for _ in range(5)))
    assert module.expected == math.inf


# ---------------------------------------------------------------- schedulers of automatic optimization


def learning_rates(config, batches=4, epochs=2, **options):
    """The learning rate each training step saw, with a schedule that halves it."""

    class Scheduled(Automatic):
        def configure_optimizers(self):
            self.optimizer = sgd(self.net, 1.0)
            schedule = {"scheduler": ExponentialLR(self.optimizer, 0.5), **config}
            return {"optimizer": self.optimizer, "lr_scheduler": schedule}

        def training_step(self, batch, batch_idx):
            self.seen.append(self.optimizer.param_groups[0]["lr"])
            return self.loss(batch)

    module = Scheduled()
    trainer(max_epochs=epochs, **options).fit(module, loader(batches))
    return module.seen


def test_epoch_schedule():
    assert learning_rates({}) == [1.0] * 4 + [0.5] * 4


def test_epoch_schedule_with_frequency():
    assert learning_rates({"frequency": 2}, batches=1, epochs=5) == [1.0, 1.0, 0.5, 0.5, 0.25]


def test_step_schedule():
    assert learning_rates({"interval": "step"}, batches=3, epochs=1) == [1.0, 0.5, 0.25]


def test_step_schedule_with_frequency():
    assert learning_rates({"interval": "step", "frequency": 2}, epochs=1) == [1.0, 1.0, 0.5, 0.5]


def test_step_schedule_counts_steps_not_accumulated_batches():
    assert learning_rates({"interval": "step"}, epochs=1, accumulate_grad_batches=2) == [1.0, 1.0, 0.5, 0.5]


class Plateau(Automatic):
    """Its monitored value never falls, so each look at it halves the learning rate."""

    config: dict = {"monitor": "val"}

    def validation_step(self, batch, batch_idx):
        self.log("val", 1.0)

    def configure_optimizers(self):
        self.optimizer = sgd(self.net, 1.0)
        plateau = ReduceLROnPlateau(self.optimizer, factor=0.5, patience=0)
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": plateau, **self.config}}


def test_plateau_follows_the_monitored_metric():
    module = Plateau()
    trainer(max_epochs=3).fit(module, loader(), loader(1))
    assert module.optimizer.param_groups[0]["lr"] == 0.25


def test_plateau_whose_metric_is_missing():
    module = Plateau()
    module.config = {"monitor": "loss"}
    with pytest.raises(ConfigurationError) as caught:
        trainer().fit(module, loader(), loader(1))
    says(caught.value, "'loss'", "only ['val']")


def test_plateau_whose_metric_may_be_missing():
    module = Plateau()
    module.config = {"monitor": "loss", "strict": False}
    with pytest.warns(UserWarning, match="'loss'"):
        trainer().fit(module, loader(), loader(1))
    assert module.optimizer.param_groups[0]["lr"] == 1.0


def test_plateau_without_a_metric_is_refused_before_the_first_batch():
    module = Plateau()
    module.config = {}
    with pytest.raises(ConfigurationError) as caught:
        trainer().fit(module, loader(), loader(1))
    says(caught.value, "monitor")
    assert module.seen == []


def test_scheduler_follows_the_steps_that_were_applied():
    """An overflow skips the step; the schedule waits (pytorch/pytorch#44511)."""

    class Overflow(Automatic):
        def training_step(self, batch, batch_idx):
            self.seen.append(self.optimizer.param_groups[0]["lr"])
            return self.loss(batch) * (float("inf") if batch_idx == 1 else 1.0)

        def configure_optimizers(self):
            self.optimizer = sgd(self.net, 1.0)
            schedule = {"scheduler": ExponentialLR(self.optimizer, 0.5), "interval": "step"}
            return {"optimizer": self.optimizer, "lr_scheduler": schedule}

    module = Overflow()
    options = {"precision": "16-mixed", "scaler_kwargs": {"init_scale": 4.0}, "nonfinite_loss": "ignore"}
    trainer(**options).fit(module, loader())
    assert module.seen == [1.0, 0.5, 0.5, 0.25]
