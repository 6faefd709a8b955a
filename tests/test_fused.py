"""`Trainer(fused=True)`: optimizers that torch can fuse, unless their user chose."""

from __future__ import annotations

import pytest
import torch
from small import Small, assert_equal, plain, square, trained

from xtrain import ConfigurationError


class Chosen(Small):
    """Trains with the optimizer it is given, and remembers it."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def configure_optimizers(self):
        return self.make(self.parameters())


MAKERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def update(layer, optimizer, batch, index):
    optimizer.zero_grad()
    square(layer, batch).backward()
    optimizer.step()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_fused_trains_the_same(make):
    module, run = trained(module=Chosen(make), fused=True)
    assert [group["fused"] for group in run.optimizers[0].param_groups] == [True]
    assert_equal(module.net, plain(update, optimizer=make))


@pytest.mark.parametrize(
    ("make", "fused"),
    [
        (lambda p: torch.optim.Adam(p, lr=0.01, fused=False), False),
        (lambda p: torch.optim.Adam(p, lr=0.01, foreach=True), None),
        (lambda p: torch.optim.RMSprop(p, lr=0.01), "none"),
    ],
    ids=["fused", "foreach", "has-none"],
)
def test_the_choice_of_the_user_and_optimizers_without_it_stay(make, fused):
    _, run = trained(module=Chosen(make), fused=True)
    assert run.optimizers[0].param_groups[0].get("fused", "none") == fused


def test_nothing_is_fused_unasked():
    assert trained(module=Chosen(MAKERS["adam"]))[1].optimizers[0].param_groups[0]["fused"] is None


def test_only_a_switch_is_understood():
    with pytest.raises(ConfigurationError, match="fused"):
        trained(fused="yes")
