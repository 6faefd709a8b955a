"""Adam and AdamW as one operation per parameter: what torch computes, and what torch does around it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_xla
import torch_xla.debug.metrics as met
from torch import nn
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import StepLR

from xtrain import LightningModule, Trainer

torch_xla.device()  # before the first backward of this process

STEPS = 12
ARITHMETIC = ("xla::lerp", "xla::lerp_", "xla::addcmul", "xla::addcdiv", "xla::addcdiv_")


class Net(LightningModule):
    """Two layers and one optimizer; ``halves`` gives each layer a group of its own."""

    def __init__(self, make: Callable[[Any], Any], halves: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.make, self.halves = make, halves

    def configure_optimizers(self) -> Any:
        if self.halves is None:
            return self.make(self.parameters())
        first, last = self.net[0].parameters(), self.net[2].parameters()
        return self.make([{"params": first}, {"params": last, **self.halves}])

    def training_step(self, x: torch.Tensor, batch_idx: int) -> None:
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward((self.net(x) - x[:, :4]).pow(2).mean())
        opt.step()


def data() -> list[torch.Tensor]:
    return list(torch.randn(STEPS, 8, 6, generator=torch.Generator().manual_seed(1)))


def fit(module: LightningModule, backend: str = "tpu", **options: Any) -> Any:
    Trainer(backend, max_epochs=1, enable_progress_bar=False, **options).fit(module, data())
    return module.trainer.run.life.optimizers[0]


def by_hand(module: Any) -> Any:
    """Train the same in plain PyTorch, on the CPU, and return the optimizer."""
    optimizer = module.configure_optimizers()
    for x in data():
        optimizer.zero_grad()
        (module.net(x) - x[:, :4]).pow(2).mean().backward()
        optimizer.step()
    return optimizer


def traced() -> int:
    """How much of torch's own arithmetic of Adam was traced so far."""
    return sum(met.counter_value(name) or 0 for name in ARITHMETIC)


CASES: dict[str, tuple[Callable[[Any], Any], dict[str, Any] | None]] = {
    "Adam": (lambda p: Adam(p, lr=0.01), None),
    "AdamW": (lambda p: AdamW(p, lr=0.01), None),
    "amsgrad": (lambda p: Adam(p, lr=0.01, amsgrad=True), None),
    "AdamW-amsgrad": (lambda p: AdamW(p, lr=0.01, amsgrad=True, weight_decay=0.1), None),
    "weight-decay": (lambda p: Adam(p, lr=0.01, weight_decay=0.1), None),
    "decoupled": (lambda p: Adam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True), None),
    "maximize": (lambda p: Adam(p, lr=0.01, maximize=True), None),
    "AdamW-maximize": (lambda p: AdamW(p, lr=0.01, maximize=True, weight_decay=0.1), None),
    "betas": (lambda p: Adam(p, lr=0.01, betas=(0.0, 0.9), eps=1e-4), None),
    "groups": (lambda p: AdamW(p, lr=0.01), {"lr": 0.03, "weight_decay": 0.2, "betas": (0.5, 0.99)}),
    "foreach": (lambda p: Adam(p, lr=0.01, foreach=True), None),
    "lr-tensor": (lambda p: Adam(p, lr=torch.tensor(0.01)), None),
}


@pytest.mark.parametrize("case", CASES)
def test_one_operation_computes_what_torch_does(case):
    ours, plain = Net(*CASES[case]), Net(*CASES[case])
    before = traced()
    optimizer, reference = fit(ours), by_hand(plain)
    assert traced() == before, "torch's own step was traced"
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach(), atol=1e-6, rtol=1e-6)
    for a, b in zip(optimizer.state.values(), reference.state.values(), strict=True):
        assert list(a) == list(b)
        for name in a:
            assert a[name].shape == b[name].shape
            assert a[name].dtype == b[name].dtype
            torch.testing.assert_close(a[name].cpu(), b[name], atol=1e-6, rtol=1e-6)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    assert settings == [{k: v for k, v in group.items() if k != "params"} for group in reference.param_groups]


def test_what_the_operation_cannot_do_is_left_to_torch():
    class OwnAdam(Adam):
        pass

    for make, options in ((OwnAdam, {}), (Adam, {"precision": "bf16-true"})):
        before = traced()
        module = Net(lambda p, make=make: make(p, lr=0.01))
        optimizer = fit(module, **options)
        assert traced() > before
        assert {float(state["step"].cpu()) for state in optimizer.state.values()} == {STEPS}


# ---------------------------------------------------------------- around the arithmetic


class Watched(Net):
    """Counts the hooks of its optimizer, and steps a schedule."""

    def __init__(self) -> None:
        super().__init__(lambda p: Adam(p, lr=0.01))
        self.calls: list[str] = []

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.register_step_pre_hook(lambda *_: self.calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: self.calls.append("after"))
        return [optimizer], [StepLR(optimizer, 1, gamma=0.5)]

    def training_step(self, x: torch.Tensor, batch_idx: int) -> None:
        super().training_step(x, batch_idx)
        self.lr_schedulers().step()


def test_hooks_of_the_optimizer_run_and_schedules_see_the_step():
    module = Watched()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a schedule warns if it thinks that no step came before it
        fit(module)
    assert module.calls == ["before", "after"] * STEPS


def test_a_parameter_without_a_gradient_is_left_alone():
    class Frozen(Net):
        def on_fit_start(self) -> None:
            self.net[0].weight.requires_grad_(False)
            self.before = self.net[0].weight.detach().clone()

    module = Frozen(lambda p: AdamW(p, lr=0.01, weight_decay=0.5))
    optimizer = fit(module)
    assert torch.equal(module.net[0].weight.cpu(), module.before.cpu())
    assert len(optimizer.state) == 3


def test_a_backward_through_parameters_that_a_step_has_changed_is_an_error():
    class TooLate(Net):
        def training_step(self, x: torch.Tensor, batch_idx: int) -> None:
            opt = self.optimizers()
            late = self.net(x).pow(2).mean()
            super().training_step(x, batch_idx)
            opt.zero_grad()
            self.manual_backward(late)

    for backend in ("tpu", "cpu"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            fit(TooLate(lambda p: Adam(p, lr=0.01)), backend)


def test_clipping_weights_between_steps_is_seen_by_the_next_one():
    """As Wasserstein GANs do: ``.data`` is another tensor over the same values."""

    class Clamped(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            for p in self.parameters():
                p.data.clamp_(-0.2, 0.2)
            with torch.no_grad():
                self.net[0].weight[0].zero_()  # one row, as for padding

    ours, plain = (Clamped(lambda p: Adam(p, lr=0.05)) for _ in range(2))
    fit(ours)
    fit(plain, "cpu")
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach(), atol=1e-6, rtol=1e-6)


def test_a_copy_of_the_optimizer_is_a_plain_one():
    module = Net(lambda p: Adam(p, lr=0.01))
    optimizer = fit(module)
    saved = copy.deepcopy(module.trainer.backend.to_cpu(optimizer.state_dict()))
    fresh = Adam(Net(lambda p: Adam(p)).parameters())
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["lr"] == 0.01
    assert {float(state["step"]) for state in fresh.state.values()} == {STEPS}
