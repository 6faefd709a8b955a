"""Schedules and closures of manual optimization, sentence by sentence, against loops in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from small import Small, assert_equal, loader, plain, square, trained
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR

# ---------------------------------------------------------------- learning-rate schedules


class Scheduled(Small):
    """One schedule for each list entry, whose config keys must not matter."""

    def __init__(self, *schedules, when):
        super().__init__()
        self.schedules, self.when = schedules, when

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.seen[-1] = round(self.optimizers().param_groups[0]["lr"], 6)
        self.when(self, self.lr_schedulers(), batch_idx)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        configs = [{"scheduler": make(optimizer), "interval": "step", "frequency": 1} for make in self.schedules]
        return [optimizer], configs


def halving(optimizer):
    return ExponentialLR(optimizer, 0.5)


def every_step(module, schedule, batch_idx):
    schedule.step()


def every_two_steps(module, schedule, batch_idx):
    if (batch_idx + 1) % 2 == 0:
        schedule.step()


def every_two_epochs(module, schedule, batch_idx):
    if module.trainer.is_last_batch and (module.trainer.current_epoch + 1) % 2 == 0:
        schedule.step()


def never(module, schedule, batch_idx): ...


@pytest.mark.parametrize(
    ("when", "rates"),
    [
        (every_step, [1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125]),
        (every_two_steps, [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]),
        (every_two_epochs, [1.0, 1.0, 1.0, 1.0, 0.5, 0.5]),
        (never, [1.0] * 6),
    ],
)
def test_schedule_is_stepped_by_the_user_alone(when, rates):
    module, _ = trained(loader(2), Scheduled(halving, when=when), max_epochs=3)
    assert module.seen == rates


def test_several_schedules():
    def both(module, schedules, batch_idx):
        first, second = schedules
        assert isinstance(first, ExponentialLR)
        assert isinstance(second, StepLR)
        first.step()
        second.step()

    module, _ = trained(module=Scheduled(halving, lambda o: StepLR(o, 2, 0.1), when=both))
    assert module.seen == pytest.approx([1.0, 0.5, 0.025, 0.0125])


@pytest.mark.parametrize("epochs", [1, 3])
def test_plateau_in_on_train_epoch_end(epochs):
    class Plateau(Scheduled):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.log("loss", torch.tensor(1.0), on_epoch=True)

        def on_train_epoch_end(self):
            schedule = self.lr_schedulers()
            assert isinstance(schedule, ReduceLROnPlateau)
            schedule.step(self.trainer.callback_metrics["loss"])

    module = Plateau(lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0), when=never)
    trained(loader(1), module, max_epochs=epochs + 1)
    assert module.seen == [1.0, 1.0, 0.5, 0.25][: epochs + 1]


# ---------------------------------------------------------------- closures


class Closed(Small):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()

        def closure():
            loss = self.loss(batch)
            opt.zero_grad()
            self.manual_backward(loss)
            self.seen.append(loss.item())
            return loss

        self.returned = opt.step(closure=closure)

    def configure_optimizers(self):
        return self.make(self.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=5),
        lambda p: torch.optim.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.1),
    ],
    ids=["lbfgs", "strong-wolfe", "sgd", "adam"],
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_closure(make, precision):
    module, run = trained(module=Closed(make), precision=precision, max_epochs=2)
    losses = []

    def update(layer, optimizer, batch, index):
        def closure():
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False):
                loss = square(layer, batch)
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            return loss

        optimizer.step(closure)

    assert_equal(module.net, plain(update, epochs=2, optimizer=make))
    assert module.seen == pytest.approx(losses)
    assert isinstance(module.returned, torch.Tensor)
    assert run.run.life.optimizers[0].applied
    assert run.global_step == run.run.life.optimizers[0].step_count == 8
