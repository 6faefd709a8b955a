"""Precision policies, and that they leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from small import Small, loader, says, trained, trainer
from torch import nn

from xtrain import ConfigurationError
from xtrain.precision import PRECISIONS, resolve_precision

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
    """Autocast in a backward would cast twice; torch's own advice is to leave it off there.

    The default dtype is the forward's: what is computed again there must be the same.
    """
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
    forward = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert found == [(False, forward), (False, torch.float32)]


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
