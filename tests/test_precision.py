"""Precision policies, the loss scaler on its own, and what neither may leave behind."""

from __future__ import annotations

import math

import pytest
import torch
from small import Small, assert_equal, loader, net, says, trained, trainer
from torch import nn

from xtrain import ConfigurationError
from xtrain.precision import PRECISIONS, LossScaler, rescale_gradients, resolve_precision

# ---------------------------------------------------------------- policies


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        *((name, name) for name in PRECISIONS),
        (None, "32-true"),
        (32, "32-true"),
        ("32", "32-true"),
        (16, "16-mixed"),
        ("16", "16-mixed"),
        ("bf16", "bf16-mixed"),
    ],
)
def test_spellings(spelling, name):
    assert resolve_precision(spelling).name == name


@pytest.mark.parametrize("spelling", ["64-true", 64, "half", "bf-16", "", "16-MIXED"])
def test_unknown_precision(spelling):
    with pytest.raises(ConfigurationError) as caught:
        trainer(precision=spelling)
    says(caught.value, "'bf16-mixed'", repr(spelling), "Trainer(precision='32-true')")


@pytest.mark.parametrize(
    ("name", "parameters", "products", "made"),
    [
        ("32-true", torch.float32, torch.float32, torch.float32),
        ("16-mixed", torch.float32, torch.float16, torch.float32),
        ("bf16-mixed", torch.float32, torch.bfloat16, torch.float32),
        ("bf16-true", torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes_in_a_training_step(name, parameters, products, made):
    class Looking(Small):
        def training_step(self, batch, batch_idx):
            opt = self.optimizers()
            opt.zero_grad()
            output = self.net(batch)
            self.seen += [self.net.weight.dtype, output.dtype, torch.zeros(1).dtype, self.dtype]
            self.manual_backward(output.float().pow(2).mean())
            self.seen.append(self.net.weight.grad.dtype)
            opt.step()

        def validation_step(self, batch, batch_idx):
            self.seen.append(self.net(batch).dtype)

    options = {"limit_train_batches": 1, "num_sanity_val_steps": 0}
    module, _ = trained(module=Looking(), validate=loader(1), precision=name, **options)
    assert module.seen == [parameters, products, made, parameters, parameters, products]


def numerical_state():
    return (
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("place", ["nowhere", "training_step", "closure", "validation_step", "before_step"])
def test_nothing_is_left_behind(precision, place):
    class Raising(Small):
        def reach(self, here):
            if here == place:
                raise KeyError(here)

        def training_step(self, batch, batch_idx):
            def closure():
                self.optimizers().zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                self.reach("closure")
                return loss

            self.reach("training_step")
            self.optimizers().step(closure)

        def validation_step(self, batch, batch_idx):
            self.reach("validation_step")

        def on_before_optimizer_step(self, optimizer):
            self.reach("before_step")

    before = numerical_state()
    run = trainer(precision=precision)
    if place == "nowhere":
        run.fit(Raising(), loader(), loader(1))
    else:
        with pytest.raises(KeyError, match=place):
            run.fit(Raising(), loader(), loader(1))
    assert numerical_state() == before


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_backward_and_step_run_in_full_precision(precision):
    """Autocast in a backward would cast twice; torch's own advice is to leave it off there."""
    found = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, gradient):
            found.append((torch.is_autocast_enabled("cpu"), torch.get_default_dtype()))
            (x,) = ctx.saved_tensors
            return 2 * x * gradient

    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            found.append((torch.is_autocast_enabled("cpu"), torch.get_default_dtype()))
            return super().step(closure)

    class Custom(Small):
        def loss(self, batch):
            return Square.apply(self.net(batch)).float().mean()

        def configure_optimizers(self):
            return Watching(self.parameters(), lr=0.1)

    scaling = {"scaler_kwargs": {"init_scale": 4.0}} if precision == "16-mixed" else {}
    trained(module=Custom(), precision=precision, limit_train_batches=1, **scaling)
    assert found == [(False, torch.float32)] * 2


def test_forward_without_gradients_then_with():
    """A cast cached under no_grad would leave the second forward without gradients (pytorch/pytorch#65766)."""

    class Target(Small):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                target = self.net(batch)
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward((self.net(batch) - target - 1).float().pow(2).mean())
            self.seen.append(self.net.weight.grad.abs().sum().item())
            opt.step()

    module, _ = trained(module=Target(), precision="bf16-mixed")
    assert all(total > 0 for total in module.seen)


def test_forward_after_a_step_sees_the_new_weights():
    class Twice(Small):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            ours = self.net(batch)
            with torch.autocast("cpu", enabled=False):
                fresh = self.net.weight.bfloat16(), self.net.bias.bfloat16()
                assert torch.equal(ours, nn.functional.linear(batch.bfloat16(), *fresh))

    trained(module=Twice(), precision="bf16-mixed")


# ---------------------------------------------------------------- the loss scaler


def ready(scaler, *gradients):
    """Optimizers of one parameter whose scaled gradients are given, unscaled by `scaler`."""
    optimizers = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.zeros(1))
        parameter.grad = torch.tensor([gradient])
        optimizers.append(torch.optim.SGD([parameter], lr=1.0))
        scaler.scale(torch.zeros(1))
        scaler.unscale_(optimizers[-1])
    return optimizers


def value_of(optimizer):
    return optimizer.param_groups[0]["params"][0].item()


def scaler_of(**options):
    return LossScaler("cpu", **{"init_scale": 8.0, "growth_interval": 2, **options})


def step(scaler, optimizer):
    """What a backend does when an optimizer steps."""
    applied = scaler.may_step(optimizer)
    if applied:
        optimizer.step()
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
    assert scaler.update_once() == 2.0
    assert scaler.current_scale == 16.0
    assert scaler.scale(torch.ones(1)).item() == 16.0


def test_growth_counts_training_steps():
    scaler = scaler_of(growth_interval=2)
    ratios = []
    for _ in range(4):
        for optimizer in ready(scaler, 8.0, 8.0):
            step(scaler, optimizer)
        ratios.append(scaler.update_once())
    assert ratios == [1.0, 2.0, 1.0, 2.0]


def test_one_overflow_backs_off_once_and_growth_starts_over():
    scaler = scaler_of(growth_interval=2)
    ratios = []
    for bad in (8.0, math.inf, 8.0, 8.0):
        for optimizer in ready(scaler, 8.0, bad, bad):
            step(scaler, optimizer)
        ratios.append(scaler.update_once())
    assert ratios == [1.0, 0.5, 1.0, 2.0]


def test_boundary_without_a_step_changes_nothing():
    scaler = scaler_of(growth_interval=1)
    ready(scaler, 8.0)
    assert scaler.update_once() == 1.0
    assert scaler.current_scale == 8.0


def test_factors_are_the_users():
    scaler = scaler_of(growth_interval=1, growth_factor=4.0, backoff_factor=0.25)
    ratios = []
    for gradient in (8.0, math.inf):
        step(scaler, *ready(scaler, gradient))
        ratios.append(scaler.update_once())
    assert ratios == [4.0, 0.25]
    assert scaler.current_scale == 8.0


@pytest.mark.parametrize("used", [False, True])
def test_state_survives_a_round_trip(used):
    old = scaler_of(growth_interval=3)
    for _ in range(5):
        step(old, *ready(old, 8.0))
        old.update_once()
    state = old.state_dict()
    assert all(isinstance(value, int | float) for value in state.values())
    new = scaler_of(growth_interval=3)
    if used:
        new.scale(torch.ones(1))
    new.load_state_dict(state)
    assert new.current_scale == old.current_scale == 16.0
    assert new.scale(torch.ones(1)).item() == 16.0
    step(new, *ready(new, 16.0))
    assert new.update_once() == 2.0  # two good steps were remembered


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
    (optimizer,) = run.optimizers
    assert module.seen == [True, False, True, False]
    assert (optimizer.step_count, optimizer.skipped_steps, run.global_step) == (2, 2, 2)
    assert run.backend.scaler.current_scale == 1.0


def test_half_precision_trains_as_single_to_rounding():
    options = {"scaler_kwargs": {"init_scale": 256.0}}
    ours, _ = trained(precision="16-mixed", max_epochs=3, **options)
    theirs, _ = trained(max_epochs=3)
    assert_equal(ours.net, theirs.net, tolerance=5e-3)
    assert not torch.equal(ours.net.weight, theirs.net.weight)
