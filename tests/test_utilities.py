"""The small functions that modules and callbacks import from `xtrain.utilities`."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from small import Small, net, rows, says, square, trained
from torch import nn

from xtrain import ConfigurationError, seed_everything
from xtrain.utilities import grad_norm, isolate_rng, move_data_to_device, rank_zero_info, rank_zero_warn


@pytest.mark.parametrize("kind", [1, 2, 2.5, "inf"])
def test_grad_norm(kind):
    layer = net()
    square(layer, rows()).backward()
    norms = grad_norm(layer, kind)
    name = f"grad_{float(kind)}_norm"
    every = torch.cat([layer.weight.grad.flatten(), layer.bias.grad])
    torch.testing.assert_close(norms[f"{name}/weight"], layer.weight.grad.flatten().norm(float(kind)))
    torch.testing.assert_close(norms[f"{name}_total"], every.norm(float(kind)))
    assert set(norms) == {f"{name}/weight", f"{name}/bias", f"{name}_total"}


def test_grad_norm_without_gradients_and_of_nonsense():
    assert grad_norm(net(), 2) == {}
    with pytest.raises(ConfigurationError) as caught:
        grad_norm(net(), 0)
    says(caught.value, "norm_type")


def test_grad_norm_is_logged_where_gradients_are_true():
    class Logging(Small):
        def on_before_optimizer_step(self, optimizer):
            self.log_dict(grad_norm(self.net, norm_type=2))

    _, run = trained([rows(2)], Logging())
    layer = net()
    square(layer, rows(2)).backward()
    expected = nn.utils.get_total_norm([p.grad for p in layer.parameters()])
    torch.testing.assert_close(run.callback_metrics["grad_2.0_norm_total"], expected)


def test_isolate_rng():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_everything(5)
    expected = draw()
    seed_everything(5)
    with isolate_rng():
        draw()
    assert draw() == expected


def test_messages_of_rank_zero(capsys):
    rank_zero_info("hello")
    assert capsys.readouterr().err == "hello\n"
    with pytest.warns(UserWarning, match="careful"):
        rank_zero_warn("careful")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = move_data_to_device({"x": [rows(1)], "y": "text"}, "meta")
    assert moved["x"][0].is_meta
    assert moved["y"] == "text"
