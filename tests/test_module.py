"""A module around its run: copies and pickles, hyperparameters, and what an exception leaves behind."""

from __future__ import annotations

import argparse
import copy
import io
import pickle

import pytest
import torch
from small import SCALED, Small, assert_equal, loader, net, rows, says, trained, trainer
from xtrain.core.mixins import HyperparametersMixin

from xtrain import ConfigurationError, LightningDataModule, LightningModule, ProtocolError
from xtrain.callbacks import Callback

# ---------------------------------------------------------------- copies


class Copied(Small):
    """Keeps a copy of itself from the middle of a training step."""

    copying = staticmethod(copy.deepcopy)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.loss(batch))
        if batch_idx == 1:
            self.weight = self.net.weight.detach().clone()
            self.copy = type(self).copying(self)
        opt.step()
        self.seen.append(batch_idx)


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = [copy.deepcopy, through_pickle, through_torch_save]


@pytest.mark.parametrize("copying", COPIES)
@pytest.mark.parametrize("options", [{}, SCALED], ids=["32-true", "16-mixed"])
def test_copy_during_a_run(copying, options, monkeypatch):
    monkeypatch.setattr(Copied, "copying", staticmethod(copying))
    module, _ = trained(module=Copied(), **options)
    assert module.seen == [0, 1, 2, 3]
    duplicate = module.copy
    assert torch.equal(duplicate.net.weight, module.weight)
    with pytest.raises(RuntimeError):
        _ = duplicate.trainer
    before = duplicate.net.weight.detach().clone()
    duplicate.seen = []
    trained(module=duplicate, **options)
    assert duplicate.seen == [0, 1, 2, 3]
    assert not torch.equal(duplicate.net.weight, before)


@pytest.mark.parametrize("copying", COPIES)
@pytest.mark.parametrize("ended", ["well", "by an exception"])
def test_copy_after_a_run(copying, ended):
    class Broken(Small):
        def training_step(self, batch, batch_idx):
            raise KeyError

    globals()["Broken"] = Broken  # pickle finds classes by name
    Broken.__qualname__ = "Broken"
    if ended == "well":
        module, _ = trained()
    else:
        module = Broken()
        with pytest.raises(KeyError):
            trained(module=module)
    duplicate = copying(module)
    assert_equal(duplicate.net, module.net, tolerance=0.0)
    assert duplicate.device == torch.device("cpu")


def test_copies_train_apart():
    module, _ = trained()
    duplicate = copy.deepcopy(module)
    trained(module=duplicate)
    longer, run = trained()
    run.max_epochs = 2
    run.fit(longer, loader())
    assert_equal(duplicate.net, longer.net)
    assert_equal(module.net, trained()[0].net)


# ---------------------------------------------------------------- hyperparameters


def saving_in_init(*names, **options):
    class Saving(LightningModule):
        def __init__(self, width=3, depth=2, *, rate=0.1, **others):
            super().__init__()
            local = "not an argument"
            self.save_hyperparameters(*names, **options)
            assert local

    return Saving


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        ((), {}, {"width": 5, "depth": 2, "rate": 0.1, "extra": "x"}),
        (("width",), {}, {"width": 5}),
        (("rate", "extra"), {}, {"rate": 0.1, "extra": "x"}),
        ((), {"ignore": "width"}, {"depth": 2, "rate": 0.1, "extra": "x"}),
        ((), {"ignore": ["width", "extra"]}, {"depth": 2, "rate": 0.1}),
        ((), {"ignore": None}, {"width": 5, "depth": 2, "rate": 0.1, "extra": "x"}),
        ((), {"logger": False}, {"width": 5, "depth": 2, "rate": 0.1, "extra": "x"}),
        (({"a": 1},), {}, {"a": 1}),
        (({"a": 1, "b": 2},), {"ignore": "b"}, {"a": 1}),
        ((argparse.Namespace(a=1, b=2),), {}, {"a": 1, "b": 2}),
    ],
)
def test_forms(names, options, expected):
    module = saving_in_init(*names, **options)(5, extra="x")
    assert module.hparams == expected
    assert all(getattr(module.hparams, name) == value for name, value in expected.items())


def test_self_may_have_another_name():
    class Other(LightningModule):
        def __init__(this, width=3):  # noqa: N805
            super().__init__()
            this.save_hyperparameters()

    assert Other(4).hparams == {"width": 4}


def test_subclass_and_base_both_save():
    class Base(saving_in_init()):
        def __init__(self, size, **kwargs):
            super().__init__(**kwargs)
            self.save_hyperparameters("size")

    assert Base(7, width=1).hparams == {"width": 1, "depth": 2, "rate": 0.1, "size": 7}


def test_unknown_hyperparameter():
    with pytest.raises(ConfigurationError) as caught:
        saving_in_init("widht")(3)
    says(caught.value, "'width'", "widht")
    with pytest.raises(AttributeError, match=r"'widht'.*'width'"):
        _ = saving_in_init("width")(3).hparams.widht


def test_saved_outside_of_init():
    with pytest.raises(ConfigurationError) as caught:
        Small().save_hyperparameters()
    says(caught.value, "__init__")


@pytest.mark.parametrize("copying", [copy.deepcopy, copy.copy, through_pickle])
def test_hyperparameters_are_copied(copying):
    module = Small()
    module.hparams.update(width=3)
    assert copying(module).hparams.width == 3
    assert copying(module.hparams) == {"width": 3}


# ---------------------------------------------------------------- exceptions


class Cleaning(Callback):
    def __init__(self):
        self.calls = []

    def on_exception(self, trainer, module, exception):
        self.calls.append(("on_exception", exception.args))

    def teardown(self, trainer, module, stage):
        self.calls.append(("teardown", stage))


PLACES = [
    *("setup", "prepare_data", "configure_optimizers", "on_fit_start", "on_train_start", "on_train_epoch_start"),
    *("on_before_batch_transfer", "on_train_batch_start", "training_step", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_before_zero_grad", "on_train_batch_end", "validation_step", "on_train_end"),
]


def failing_in(place, error=KeyError):
    class Failing(Small):
        def validation_step(self, batch, batch_idx): ...

    def fail(self, *args, **kwargs):
        self.train(False)
        raise error(place)

    setattr(Failing, place, fail)
    return Failing


@pytest.mark.filterwarnings("ignore:Expected every layer in train mode")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("options", [{}, SCALED], ids=["32-true", "16-mixed"])
def test_exception_anywhere_leaves_a_usable_module_and_trainer(place, options):
    cleaning, module = Cleaning(), failing_in(place)()
    run = trainer(callbacks=cleaning, **options)
    with pytest.raises(KeyError, match=place):
        run.fit(module, loader(), loader(1))
    assert cleaning.calls == [("on_exception", (place,)), ("teardown", "fit")]
    assert [run.training, run.validating, run.sanity_checking] == [False] * 3
    fresh = Small()
    fresh.net = module.net
    fresh.net.load_state_dict(net().state_dict())
    fresh.zero_grad()
    run.max_epochs = -1
    run.fit(fresh, loader(), steps=2)
    assert fresh.seen == [0, 1]
    reference, _ = trained(steps=2, **options)
    assert_equal(fresh.net, reference.net)


def test_keyboard_interrupt_is_cleaned_up_too():
    cleaning = Cleaning()
    with pytest.raises(KeyboardInterrupt):
        trained(module=failing_in("training_step", KeyboardInterrupt)(), callbacks=cleaning)
    assert [name for name, _ in cleaning.calls] == ["on_exception", "teardown"]


@pytest.mark.filterwarnings("ignore:Expected every layer in train mode")
@pytest.mark.parametrize("hook", ["on_exception", "teardown"])
def test_clean_up_that_fails_still_finishes(hook):
    class Clumsy(Callback):
        def fail(self, *_):
            raise RuntimeError("clumsy")

    setattr(Clumsy, hook, Clumsy.fail)
    module, run = failing_in("training_step")(), trainer(callbacks=[Clumsy()])
    with pytest.raises((KeyError, RuntimeError)):
        run.fit(module, loader())
    assert not run.training
    with pytest.raises(ProtocolError):
        module.toggle_optimizer(module.optimizers())
    del type(module).training_step
    assert trained(module=module)[0].seen == [0, 1, 2, 3]


def test_guards_of_a_scaled_run_end_with_it():
    """Afterwards the parameters and the raw optimizer are the user's own again."""
    module, run = trained(**SCALED)
    (optimizer,) = run.run.life.optimizers
    module.loss(rows(2)).backward()
    optimizer.optimizer.step()


def test_failing_teardown_of_a_good_run_is_told():
    with pytest.raises(KeyError, match="teardown"):
        trained(module=failing_in("teardown")())


def test_an_item_and_an_attribute_of_hparams_are_one_value():
    module = saving_in_init()(width=3)
    module.hparams.width = 7
    assert module.hparams["width"] == 7
    module.hparams["depth"] = 9
    assert module.hparams.depth == 9
    del module.hparams.rate
    assert "rate" not in module.hparams
    with pytest.raises(AttributeError, match="'rate'"):
        del module.hparams.rate


def test_saving_in_a_base_class_keeps_the_arguments_of_the_derived_one():
    class Derived(saving_in_init()):
        def __init__(self, size, width=4):
            super().__init__(width=width * 2)

    assert Derived(7).hparams == {"size": 7, "width": 4, "depth": 2, "rate": 0.1}


# ---------------------------------------------------------------- before super().__init__()


def test_plain_attributes_may_come_first():
    """As in torch: what is no layer and no parameter may be set before ``super().__init__()``."""

    class Early(Small):
        def __init__(self):
            self.source, self.shift = "file", torch.ones(1)
            super().__init__()

    class TooEarly(Small):
        def __init__(self):
            self.layer = torch.nn.Linear(1, 1)
            super().__init__()

    module = trained(loader(2), Early())[0]
    assert (module.source, module.shift) == ("file", torch.ones(1))
    with pytest.raises(ConfigurationError) as caught:
        TooEarly()
    says(caught.value, "TooEarly", "self.layer", "super().__init__()")


# ---------------------------------------------------------------- hyperparameters of base classes and DataModules


@pytest.mark.parametrize("ignore", ["net", ["net"]])
def test_a_derived_class_leaves_out_what_its_base_kept(ignore):
    class Base(Small):
        def __init__(self, net, lr):
            super().__init__()
            self.save_hyperparameters()

    class Derived(Base):
        def __init__(self, net, lr):
            super().__init__(net, lr)
            self.save_hyperparameters(ignore=ignore)

    module = Derived("large", 0.1)
    assert module.hparams == module.hparams_initial == {"lr": 0.1}
    assert Base("large", 0.1).hparams == {"net": "large", "lr": 0.1}


@pytest.mark.parametrize("size", [2, 3])
def test_module_and_datamodule_agree_on_what_they_both_keep(size):
    class Data(LightningDataModule):
        def __init__(self, size, weights):
            super().__init__()
            self.save_hyperparameters()
            self.train_dataloader = lambda: loader(1)

    class Module(Small):
        def __init__(self, size, weights):
            super().__init__()
            self.save_hyperparameters()

    module, data = Module(2, torch.ones(2)), Data(size, torch.ones(2))
    if size == 2:
        trainer(logger=False).fit(module, datamodule=data)
        return
    with pytest.raises(ConfigurationError) as caught:
        trainer().fit(module, datamodule=data)
    says(caught.value, "size=3 and size=2", "save_hyperparameters(ignore='size')")


def test_a_class_of_ones_own_keeps_hyperparameters():
    class Config(HyperparametersMixin):
        def __init__(self, lr=0.1):
            self.save_hyperparameters()

    assert Config(lr=0.3).hparams == {"lr": 0.3}
