"""The shortcuts of the eager step do what torch does: the clip to the bit, `zero_grad` unless it is overridden."""

from __future__ import annotations

import itertools

import pytest
import torch
from small import Small, trained
from xtrain_backends.eager.gradients import clip_norm

BOUNDS = (0.1, 1e9, float("inf"))


def pair(dtypes, shapes, missing=()):
    """Return two equal lists of parameters with gradients."""
    ours, theirs = [], []
    for index, (dtype, shape) in enumerate(zip(dtypes, shapes, strict=True)):
        gradient = torch.randn(shape).to(dtype)
        for parameters in (ours, theirs):
            parameters.append(torch.zeros(shape, dtype=dtype, requires_grad=True))
            parameters[-1].grad = None if index in missing else gradient.clone()
    return ours, theirs


def assert_same_clip(ours, theirs, bound):
    norm, expected = clip_norm(ours, bound), torch.nn.utils.clip_grad_norm_(theirs, bound)
    assert torch.equal(norm, expected)
    assert norm.dtype is expected.dtype
    for p, q in zip(ours, theirs, strict=True):
        assert (p.grad is None) is (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bound", BOUNDS)
def test_same_bits(dtype, bound):
    assert_same_clip(*pair([dtype] * 4, [(17, 5), (), (33,), (2, 3, 4)]), bound)


@pytest.mark.parametrize("bound", BOUNDS)
def test_same_bits_with_missing_gradients_and_mixed_dtypes(bound):
    mixed = [torch.float32, torch.bfloat16, torch.float32]
    for missing in itertools.chain([()], [(0,), (1,), (0, 1, 2)]):
        assert_same_clip(*pair(mixed, [(4, 4), (5,), (6,)], missing), bound)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_same_bits_of_gradients_that_are_not_finite(value):
    ours, theirs = pair([torch.float32] * 2, [(3,), (4,)])
    for parameters in (ours, theirs):
        parameters[0].grad[1] = value
    norm, expected = clip_norm(ours, 1.0), torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.testing.assert_close(norm, expected, rtol=0, atol=0, equal_nan=True)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, equal_nan=True)


class Zeroing(torch.optim.SGD):
    """Counts, as an optimizer with state of its own to reset would have to."""

    zeroed = 0

    def zero_grad(self, set_to_none=True):
        self.zeroed += 1
        super().zero_grad(set_to_none)


def test_an_optimizer_with_its_own_zero_grad_is_asked():
    class Own(Small):
        def configure_optimizers(self):
            return Zeroing(self.parameters(), lr=0.1)

    assert trained(module=Own())[1].optimizers[0].zeroed == 4


def test_gradients_are_dropped():
    class Dropping(Small):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            opt = self.optimizers()
            assert all(p.grad is not None for p in opt.parameters)
            opt.zero_grad()
            assert all(p.grad is None for p in opt.parameters)

    trained(module=Dropping())
