"""How long `Trainer.fit` goes on, and what it counts."""

from __future__ import annotations

import pytest
import torch
from small import Automatic, Small, assert_equal, loader, net, trained, trainer

from xtrain.callbacks import Callback

# ---------------------------------------------------------------- how long


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"max_epochs": 2}, [0, 1, 2, 3, 0, 1, 2, 3]),
        ({"max_epochs": 0}, []),
        ({"max_steps": 6}, [0, 1, 2, 3, 0, 1]),
        ({"max_steps": 0}, []),
        ({"max_steps": 6, "max_epochs": 1}, [0, 1, 2, 3]),
        ({"max_steps": 3, "max_epochs": -1}, [0, 1, 2]),
        ({"max_epochs": 2, "limit_train_batches": 3}, [0, 1, 2, 0, 1, 2]),
        ({"max_epochs": 1, "limit_train_batches": 99}, [0, 1, 2, 3]),
        ({"max_epochs": 1, "limit_train_batches": 0.5}, [0, 1]),
        ({"max_epochs": 1, "limit_train_batches": 1.0}, [0, 1, 2, 3]),
        ({"max_epochs": 1, "limit_train_batches": 1}, [0]),
        ({"max_epochs": 2, "limit_train_batches": 0}, []),
        ({"max_steps": 2, "limit_train_batches": 0}, []),
        ({"fast_dev_run": True, "max_epochs": 5}, [0]),
        ({"fast_dev_run": 2, "max_steps": 50}, [0, 1]),
    ],
)
def test_length_of_training(options, seen):
    module, run = trained(**options)
    assert module.seen == seen
    assert run.global_step == len(seen)


@pytest.mark.parametrize(("steps", "seen"), [(2, [0, 1]), (4, [0, 1, 2, 3]), (6, [0, 1, 2, 3, 0, 1])])
def test_steps_of_one_call(steps, seen):
    assert trained(steps=steps, max_epochs=None)[0].seen == seen


def test_steps_do_not_exceed_the_epochs():
    assert trained(steps=6, max_epochs=1)[0].seen == [0, 1, 2, 3]


def test_steps_count_batches_even_if_nothing_steps():
    class Waiting(Small):
        def training_step(self, batch, batch_idx):
            self.seen.append(batch_idx)

    module, run = trained(module=Waiting(), steps=3)
    assert module.seen == [0, 1, 2]
    assert run.global_step == 0


def test_current_epoch_during_and_after():
    class Epochs(Small):
        def on_train_epoch_start(self):
            self.seen.append((self.current_epoch, self.trainer.current_epoch))

    module, run = trained(module=Epochs(), max_epochs=3, limit_train_batches=1)
    assert module.seen == [(0, 0), 0, (1, 1), 0, (2, 2), 0]
    assert run.current_epoch == 3


@pytest.mark.parametrize("place", ["training_step", "on_train_batch_end"])
def test_should_stop_ends_after_the_batch(place):
    class Stopping(Small):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.trainer.should_stop = place == "training_step" and batch_idx == 1

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if place == "on_train_batch_end" and batch_idx == 1:
                self.trainer.should_stop = True

    module, run = trained(module=Stopping(), max_epochs=5)
    assert module.seen == [0, 1]
    run.fit(module, loader())  # a new call starts afresh
    assert module.seen == [0, 1] * 2


def test_batch_start_may_skip_the_rest_of_the_epoch():
    class Impatient(Small):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    assert trained(module=Impatient(), max_epochs=2)[0].seen == [0, 1, 0, 1]


def test_refit_continues():
    module = Small()
    run = trainer(max_epochs=2)
    run.fit(module, loader())
    with pytest.warns(UserWarning, match=r"Received: max_epochs=2, reached\.\nFix: .*trainer\.max_epochs \+= 1"):
        run.fit(module, loader())
    assert (run.global_step, run.current_epoch, len(module.seen)) == (8, 2, 8)
    run.max_epochs = 3
    run.fit(module, loader())
    assert (run.global_step, run.current_epoch, len(module.seen)) == (12, 3, 12)


@pytest.mark.parametrize("limit", ["max_epochs", "max_steps"])
def test_refit_after_a_lower_limit_trains_nothing(limit):
    module = Small()
    run = trainer(max_epochs=3)
    run.fit(module, loader())
    setattr(run, limit, 1)
    with pytest.warns(UserWarning, match=f"Received: .*{limit}=1, reached"):
        run.fit(module, loader())
    assert len(module.seen) == 12


def test_refit_equals_one_longer_fit_of_a_stateless_optimizer():
    module = Small()
    run = trainer(max_epochs=-1)
    run.fit(module, loader(), steps=2)
    run.fit(module, loader(), steps=3)
    reference = net()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    data = list(loader())
    for batch in [*data[:2], *data[:3]]:
        optimizer.zero_grad()
        reference(batch).pow(2).mean().backward()
        optimizer.step()
    assert_equal(module.net, reference)


# ---------------------------------------------------------------- what is counted


class Alternating(Small):
    """The critic steps on every batch, the generator on every fifth (five to one, as in a Wasserstein GAN)."""

    def __init__(self):
        super().__init__()
        self.other = net(1)
        self.counts = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch_idx)
        critic, generator = self.optimizers()
        for opt, layer, due in ((critic, self.net, True), (generator, self.other, (batch_idx + 1) % 5 == 0)):
            if due:
                opt.zero_grad()
                self.manual_backward(layer(batch).pow(2).mean())
                opt.step()
        self.counts.append((self.global_step, critic.step_count, generator.step_count))

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net, self.other)]


def test_global_step_counts_training_steps_and_each_optimizer_its_own():
    module, run = trained(loader(10), Alternating())
    critic, generator = run.run.life.optimizers
    assert (run.global_step, critic.step_count, generator.step_count) == (10, 10, 2)
    assert module.counts[-1] == (9, 10, 2)  # inside a step, global_step counts those before it


def test_max_steps_is_training_steps():
    """Two optimizers do not halve a training run (Lightning ran three batches here)."""
    module, _ = trained(loader(10), Alternating(), max_steps=6)
    assert len(module.seen) == 6


def test_batch_without_a_step_does_not_count():
    class EveryOther(Small):
        def training_step(self, batch, batch_idx):
            self.seen.append(batch_idx)
            if batch_idx % 2:
                super().training_step(batch, batch_idx)
                self.seen.pop()

    module, run = trained(module=EveryOther(), max_steps=3)
    assert module.seen == [0, 1, 2, 3, 0, 1]
    assert run.global_step == 3


@pytest.mark.parametrize(("batches", "every", "steps"), [(4, 2, 2), (5, 2, 3), (4, 8, 1)])
def test_accumulation_steps_also_at_the_end_of_the_epoch(batches, every, steps):
    _, run = trained(loader(batches), Automatic(), accumulate_grad_batches=every)
    assert run.global_step == run.run.life.optimizers[0].step_count == steps


def test_step_returning_none_is_skipped_in_automatic_optimization():
    class Skipping(Automatic):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    with pytest.warns(UserWarning, match="Expected a loss from training_step"):
        module, run = trained(module=Skipping())
    assert module.seen == [0, 1, 2, 3]
    assert run.global_step == 3


def test_state_seen_by_a_callback():
    class Watch(Callback):
        def __init__(self):
            self.rows = []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.rows.append((trainer.batch_idx, trainer.global_step, module.global_step, trainer.training))

    watch = Watch()
    _, run = trained(callbacks=watch, limit_train_batches=2)
    assert watch.rows == [(0, 1, 1, True), (1, 2, 2, True)]
    assert not run.training
