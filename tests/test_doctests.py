"""Every public name has an example in its docstring, and the examples run.

Those of a module's and an optimizer's methods are lines of a training step: they run inside of one, where ``self``,
``opt``, ``batch`` and ``batch_idx`` are what a step has.
"""

import doctest
import inspect
import sys

import pytest
import torch
from torch import nn

import xtrain
import xtrain.callbacks
import xtrain.loggers
from xtrain import LightningModule, LightningOptimizer, Trainer
from xtrain.hooks import ModuleHooks
from xtrain.loggers import TensorBoardLogger

# What a user overrides, and what the loop alone calls: the class says what they are for.
NOT_CALLED_BY_USERS = {
    LightningModule: {
        *(hook for base in ModuleHooks.__mro__ for hook in vars(base)),
        "training_step",
        "validation_step",
        "test_step",
        "predict_step",
        "configure_optimizers",
        "configure_gradient_clipping",
        "optimizer_step",
        "optimizer_zero_grad",
        "lr_scheduler_step",
    },
    LightningOptimizer: {"allows"},
    Trainer: {"call"},
}
PACKAGES = (xtrain, xtrain.callbacks, xtrain.loggers)
OBJECTS = {f"{package.__name__}.{name}": getattr(package, name) for package in PACKAGES for name in package.__all__}
METHODS = {
    f"{cls.__name__}.{name}": (cls, member)
    for cls, others in NOT_CALLED_BY_USERS.items()
    for base in cls.__mro__
    if base.__module__.startswith("xtrain")
    for name, member in vars(base).items()
    if inspect.isfunction(member) and not name.startswith("_") and name not in others and hasattr(cls, name)
}


class Regression(LightningModule):
    """The module of the examples: one layer, one optimizer, one scheduler."""

    def __init__(self, examples=None):
        super().__init__()
        self.automatic_optimization = False
        self.net, self.examples = nn.Linear(3, 1), examples

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def forward(self, batch):
        return self.net(batch)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        if self.examples is not None:
            self.examples(self=self, opt=opt, batch=batch, batch_idx=batch_idx)
        else:
            self.manual_backward(self.net(batch).square().mean())
            opt.step()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch).square().mean())

    test_step = validation_step


def data():
    return [torch.ones(2, 3)] * 4


def quiet(*arguments, **options):
    return Trainer(*arguments, **{"enable_progress_bar": False, "max_epochs": 1, **options})


def run(name, thing, **names):
    """Run the examples in the docstring of `thing`; fail with what differs."""
    module = sys.modules[inspect.unwrap(thing).__module__]
    public = {name: getattr(xtrain, name) for name in xtrain.__all__}
    names = {**vars(module), **public, "torch": torch, "nn": nn, "xtrain": xtrain, **names}
    examples = doctest.DocTestParser().get_doctest(inspect.getdoc(thing), names, name, module.__file__, None)
    assert examples.examples, f"Expected an example in the docstring of {name}.\nFix:  Example:\n    >>> ..."
    said = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(examples, out=said.append)
    assert not said, "".join(said)


def run_in_step(name, thing):
    """Run the examples of `thing` in a training step."""
    seen = []
    module = Regression(lambda **names: seen.append(run(name, thing, **names)))
    quiet(limit_train_batches=1).fit(module, data())
    assert seen


@pytest.mark.parametrize("name", OBJECTS)
def test_public_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        "data": data(),
        "module": Regression(),
        "trainer": quiet(),
        "TensorBoardLogger": TensorBoardLogger,
        "Regression": Regression,
        "__name__": __name__,
    }
    if OBJECTS[name] is LightningOptimizer:
        run_in_step(name, LightningOptimizer)
    else:
        run(name, OBJECTS[name], **names)


@pytest.mark.parametrize("name", METHODS)
def test_method(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cls, method = METHODS[name]
    if cls is Trainer:
        trainer = quiet()
        trainer.fit(Regression(), data())
        run(name, method, data=data(), module=Regression(), trainer=trainer)
    else:
        run_in_step(name, method)


def test_the_examples_can_fail():
    """An example whose output is wrong is reported."""

    def wrong():
        """Say three.

        Example:
            >>> 1 + 1
            3
        """

    with pytest.raises(AssertionError, match=r"Expected:\s+3\s+Got:\s+2"):
        run("wrong", wrong)
