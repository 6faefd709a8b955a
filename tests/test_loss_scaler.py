"""The loss scaler for several optimizers, on its own and in a run."""

from __future__ import annotations

import math

import pytest
import torch
from small import Small, assert_equal, loader, net, trained
from torch import nn

from xtrain import ConfigurationError
from xtrain.contract import Phase
from xtrain.scaler import LossScaler, rescale_gradients

# ---------------------------------------------------------------- the loss scaler


class Handle:
    """An optimizer as a backend sees it."""

    phase = Phase.FINALIZED

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def parameters(self):
        return self.optimizer.param_groups[0]["params"]


def ready(scaler, *gradients):
    """Optimizers of one parameter whose scaled gradients are given, unscaled by `scaler`."""
    optimizers = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.zeros(1))
        parameter.grad = torch.tensor([gradient])
        optimizers.append(Handle(torch.optim.SGD([parameter], lr=1.0)))
        scaler.unscale(optimizers[-1])
    return optimizers


def value_of(optimizer):
    return optimizer.parameters[0].item()


def scaler_of(**options):
    return LossScaler("cpu", **{"init_scale": 8.0, "growth_interval": 2, **options})


def update(scaler):
    """End a training step; returns the factor by which the scale changed."""
    before = scaler.current_scale
    scaler.update([])
    return scaler.current_scale / before


def step(scaler, optimizer):
    """What a backend does when an optimizer steps."""
    applied = scaler.may_step(optimizer)
    if applied:
        optimizer.optimizer.step()
    return applied


def test_scaling():
    scaler = scaler_of()
    assert scaler.scale(torch.tensor(3.0)).item() == 24.0
    assert scaler.current_scale == 8.0


def test_step_uses_true_gradients_and_says_so():
    scaler = scaler_of()
    (optimizer,) = ready(scaler, 16.0)
    assert step(scaler, optimizer)
    assert value_of(optimizer) == -2.0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_overflow_skips_only_its_own_optimizer(bad):
    scaler = scaler_of()
    good, overflowed = ready(scaler, 16.0, bad)
    assert not step(scaler, overflowed)
    assert step(scaler, good)
    assert (value_of(good), value_of(overflowed)) == (-2.0, 0.0)


def test_scale_changes_once_for_all_optimizers():
    scaler = scaler_of(growth_interval=1)
    for optimizer in ready(scaler, 8.0, 8.0, 8.0):
        step(scaler, optimizer)
        assert scaler.current_scale == 8.0
    scaler.update([])
    assert scaler.current_scale == 16.0
    assert scaler.scale(torch.ones(1)).item() == 16.0


def test_growth_counts_training_steps():
    scaler = scaler_of(growth_interval=2)
    ratios = []
    for _ in range(4):
        for optimizer in ready(scaler, 8.0, 8.0):
            step(scaler, optimizer)
        ratios.append(update(scaler))
    assert ratios == [1.0, 2.0, 1.0, 2.0]


def test_one_overflow_backs_off_once_and_growth_starts_over():
    scaler = scaler_of(growth_interval=2)
    ratios = []
    for bad in (8.0, math.inf, 8.0, 8.0):
        for optimizer in ready(scaler, 8.0, bad, bad):
            step(scaler, optimizer)
        ratios.append(update(scaler))
    assert ratios == [1.0, 0.5, 1.0, 2.0]


def test_boundary_without_a_step_changes_nothing():
    scaler = scaler_of(growth_interval=1)
    ready(scaler, 8.0)
    assert update(scaler) == 1.0
    assert scaler.current_scale == 8.0


def test_factors_are_the_users():
    scaler = scaler_of(growth_interval=1, growth_factor=4.0, backoff_factor=0.25)
    ratios = []
    for gradient in (8.0, math.inf):
        step(scaler, *ready(scaler, gradient))
        ratios.append(update(scaler))
    assert ratios == [4.0, 0.25]
    assert scaler.current_scale == 8.0


@pytest.mark.parametrize("used", [False, True])
def test_state_survives_a_round_trip(used):
    old = scaler_of(growth_interval=3)
    for _ in range(5):
        step(old, *ready(old, 8.0))
        update(old)
    state = old.state_dict()
    assert all(isinstance(value, int | float) for value in state.values())
    new = scaler_of(growth_interval=3)
    if used:
        new.scale(torch.ones(1))
    new.load_state_dict(state)
    assert new.current_scale == old.current_scale == 16.0
    assert new.scale(torch.ones(1)).item() == 16.0
    step(new, *ready(new, 16.0))
    assert update(new) == 2.0  # two good steps were remembered


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_broken_state_is_refused(scale):
    with pytest.raises(ConfigurationError, match="finite and positive"):
        scaler_of().load_state_dict({"scale": scale, "good_steps": 0})


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"initial_scale": 4.0}, "initial_scale"),
        ({"growth_factor": 0.5}, "growth_factor"),
        ({"backoff_factor": 2.0}, "backoff_factor"),
    ],
)
def test_unknown_or_meaningless_option(options, part):
    module = Small()
    with pytest.raises(ConfigurationError, match=part):
        trained(module=module, precision="16-mixed", scaler_kwargs=options)
    assert module.seen == []


def test_rescaling():
    layer = net()
    layer.weight.grad = torch.tensor([[1.0, -2.0, 0.5]])
    rescale_gradients(layer.parameters(), 4.0)
    assert layer.weight.grad.tolist() == [[4.0, -8.0, 2.0]]
    assert layer.bias.grad is None


# ---------------------------------------------------------------- the loss scaler in a run


def test_scale_goes_on_in_a_second_fit():
    module, run = trained(precision="16-mixed", scaler_kwargs={"init_scale": 4.0, "growth_interval": 1})
    scale = run.backend.scaler.current_scale
    assert scale == 4.0 * 2**4
    run.max_epochs = 2
    run.fit(module, loader(1))
    assert run.backend.scaler.current_scale == scale * 2


def test_applied_counts_and_skips():
    class Overflowing(Small):
        def training_step(self, batch, batch_idx):
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(self.loss(batch) * (float("inf") if batch_idx % 2 else 1.0))
            before = self.net.weight.clone()
            applied = opt.step()
            assert applied is opt.applied
            assert torch.equal(before, self.net.weight) is not applied
            self.seen.append(applied)

    options = {"scaler_kwargs": {"init_scale": 4.0}, "nonfinite_loss": "ignore"}
    module, run = trained(module=Overflowing(), precision="16-mixed", **options)
    (optimizer,) = run.run.life.optimizers
    assert module.seen == [True, False, True, False]
    assert (optimizer.step_count, optimizer.skipped_steps, run.global_step) == (2, 2, 2)
    assert run.backend.scaler.current_scale == 1.0


def test_half_precision_trains_as_single_to_rounding():
    options = {"scaler_kwargs": {"init_scale": 256.0}}
    ours, _ = trained(precision="16-mixed", max_epochs=3, **options)
    theirs, _ = trained(max_epochs=3)
    assert_equal(ours.net, theirs.net, tolerance=5e-3)
    assert not torch.equal(ours.net.weight, theirs.net.weight)
