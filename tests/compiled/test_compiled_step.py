"""``Trainer(compile="step")``: what is replayed is what eager steps do, and what cannot be is seen and told."""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
from small import says
from torch import nn

from xtrain import ConfigurationError, LightningModule, NonFiniteLossError, ProtocolError, Trainer
from xtrain.testing.compiled import without_inductor


class Model(LightningModule):
    """Two layers with batch norm and dropout, Adam; the step adds noise, and logs its loss."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.losses = []

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01, betas=(0.5, 0.9), eps=1e-4)

    def loss(self, batch):
        return self.net(batch + 0.1 * torch.randn_like(batch)).square().mean()

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        loss = self.loss(batch)
        opt.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(opt, gradient_clip_val=0.5)
        opt.step()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]) if outputs else 0.0)


def data(batches=8, last=4):
    generator = torch.Generator().manual_seed(3)
    sizes = [4] * (batches - 1) + [last]
    return [torch.randn(size, 3, generator=generator) for size in sizes]


def fit(module, compile="step", epochs=3, batches=None, seed=5, **options):
    """Train `module` and return the Trainer and the reasons that were told."""
    trainer = Trainer("cpu", max_epochs=epochs, enable_progress_bar=False, compile=compile, **options)
    torch.manual_seed(seed)
    random.seed(seed)
    with warnings.catch_warnings(record=True) as caught, without_inductor():
        warnings.simplefilter("always")
        trainer.fit(module, data() if batches is None else batches)
    return trainer, [str(w.message) for w in caught if "run eagerly" in str(w.message)]


def assert_same(kind, epochs=3, batches=None, replays=None, reasons=(), **options):
    """Check that `kind` trains the same with and without a compiler, and how much of it was replayed."""
    plain, compiled = kind(), kind()
    expected, _ = fit(plain, None, epochs, batches, **options)
    trainer, told = fit(compiled, "step", epochs, batches, **options)
    for (name, ours), theirs in zip(compiled.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=f"{name}: {ours} != {theirs}")
    torch.testing.assert_close(torch.tensor(compiled.losses), torch.tensor(plain.losses), rtol=1e-4, atol=1e-5)
    assert (trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]) == (
        expected.global_step,
        expected.optimizers[0].param_groups[0]["lr"],
    )
    for name, value in expected.callback_metrics.items():
        torch.testing.assert_close(trainer.callback_metrics[name], value, rtol=1e-4, atol=1e-5)
    step = trainer.compiled_step
    assert len(told) == len(reasons), told
    for text, part in zip(told, reasons, strict=True):
        assert part in text
    if replays is not None:
        assert (step.replays > 0) is replays
    return compiled, trainer


# ---------------------------------------------------------------- replayed


def test_random_numbers_buffers_metrics_and_a_smaller_last_batch():
    _, trainer = assert_same(Model, epochs=4, batches=data(6, last=3), replays=True)
    step = trainer.compiled_step
    assert step.compilations == 2
    assert step.recordings + step.replays + step.eager == 24


def test_no_path_is_recorded_or_compiled_after_the_second_epoch():
    trainer, _ = fit(Model(), epochs=2, batches=data(6, last=3))
    again, _ = fit(Model(), epochs=5, batches=data(6, last=3))
    assert again.compiled_step.compilations == trainer.compiled_step.compilations == 2
    assert len(again.compiled_step.paths) == 2


def test_learning_rates_of_schedulers_never_recompile():
    class Scheduled(Model):
        def configure_optimizers(self):
            opt = super().configure_optimizers()
            return [opt], [torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)]

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.lr_schedulers().step()
            self.log("lr", self.optimizers().param_groups[0]["lr"])
            return loss

    _, trainer = assert_same(Scheduled, replays=True)
    assert trainer.compiled_step.compilations == 1


def test_an_average_of_the_weights_and_tensors_in_attributes():
    class Averaged(Model):
        def __init__(self):
            super().__init__()
            self.average = copy.deepcopy(self.net).requires_grad_(False)
            self.phase = "new"

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            with torch.no_grad():
                for ours, theirs in zip(self.average.parameters(), self.net.parameters(), strict=True):
                    ours.lerp_(theirs, 0.1)
            self.kept = self.net(batch).detach().mean()
            self.index, self.phase = batch_idx, "old"
            return loss

        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert self.index == batch_idx
            assert type(self.index) is int
            self.losses.append(float(self.kept))

    assert_same(Averaged, replays=True)


@pytest.mark.parametrize("every", [2, 3])
def test_branches_on_the_index_and_the_epoch_are_paths(every):
    class Branching(Model):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if (batch_idx + 1) % every == 0 or self.current_epoch == 1:
                opt = self.optimizers()
                opt.zero_grad()
                self.manual_backward(self.loss(-batch))
                opt.step()
            return loss

    _, trainer = assert_same(Branching, epochs=4, replays=True)
    assert 2 <= len(trainer.compiled_step.paths) <= 4


def test_a_flag_that_a_hook_sets_decides_a_branch():
    class Warming(Model):
        def on_train_batch_start(self, batch, batch_idx):
            self.warm = batch_idx >= 5

        def training_step(self, batch, batch_idx):
            return super().training_step(batch if self.warm else batch * 0.1, batch_idx)

    _, trainer = assert_same(Warming, replays=True)
    assert len(trainer.compiled_step.paths) == 2


def _in_hparams(self, on):
    self.hparams.factor = 2.0 if on else 1.0


def _in_a_list(self, on):
    self.table["a"][0] = 2.0 if on else 1.0


def _in_a_layer(self, on):
    self.net[2].p = 0.6 if on else 0.3


def _in_a_group(self, on):
    self.optimizers().param_groups[0]["weight_decay"] = 0.5 if on else 0.0


def _frozen(self, on):
    self.net[0].requires_grad_(not on)


def _in_eval_mode(self, on):
    self.net.train(not on)


@pytest.mark.parametrize("change", [_in_hparams, _in_a_list, _in_a_layer, _in_a_group, _frozen, _in_eval_mode])
def test_what_a_hook_changes_is_another_path(change):
    class Changing(Model):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"factor": 1.0})
            self.table = {"a": [1.0]}

        def on_train_batch_start(self, batch, batch_idx):
            change(self, batch_idx >= 5)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch * self.hparams.factor * self.table["a"][0], batch_idx)

    _, trainer = assert_same(Changing, replays=True)
    assert len(trainer.compiled_step.paths) >= 2


def test_a_group_that_is_added_trains():
    class Growing(Model):
        def __init__(self):
            super().__init__()
            self.extra = nn.Parameter(torch.ones(3))

        def configure_optimizers(self):
            return torch.optim.Adam(self.net.parameters(), lr=0.01, eps=1e-4)

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.optimizers().optimizer.add_param_group({"params": [self.extra]})

        def training_step(self, batch, batch_idx):
            return super().training_step(batch * self.extra, batch_idx)

    module, _ = assert_same(Growing, replays=True)
    assert not torch.equal(module.extra, torch.ones(3))


def test_an_optimizer_that_counts_in_python_runs_eagerly():
    class Counting(torch.optim.SGD):
        number = 0

        def step(self, closure=None):
            self.number += 1
            self.param_groups[0]["weight_decay"] = 0.0 if self.number % 7 else 0.5
            return super().step(closure)

    class Counted(Model):
        def configure_optimizers(self):
            return Counting(self.parameters(), lr=0.05)

    assert_same(Counted, replays=False, reasons=["an optimizer counts in Python"])


def test_gradients_live_across_steps_and_validation():
    class Accumulating(Model):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.manual_backward(loss / 2)
            if batch_idx % 2:
                opt = self.optimizers()
                opt.step()
                opt.zero_grad()
            return loss

    assert_same(Accumulating, replays=True)


def test_automatic_optimization_with_accumulation_and_a_schedule_per_step():
    class Automatic(Model):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = True

        def configure_optimizers(self):
            opt = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
            return {"optimizer": opt, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log("loss", loss)
            return loss

    assert_same(Automatic, epochs=4, replays=True, accumulate_grad_batches=2, gradient_clip_val=0.1)


def test_loaded_states_of_optimizers_are_the_ones_that_train():
    class Loading(Model):
        def on_train_epoch_start(self):
            raw = self.optimizers().optimizer
            if raw.state:
                state = copy.deepcopy(raw.state_dict())
                for values in state["state"].values():
                    values["exp_avg"].zero_()
                raw.load_state_dict(state)

    assert_same(Loading, replays=True)


def test_gradients_are_where_eager_steps_leave_them():
    class Looking(Model):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.losses.append(sum(float(p.grad.norm()) for p in self.parameters()))

    assert_same(Looking, replays=True)


# ---------------------------------------------------------------- seen, told, and eager


def stepping(body):
    """A `Model` whose step does `body` after its own work."""

    class Other(Model):
        count = 0

        def __init__(self):
            super().__init__()
            self.number, self.seen, self.table = 0, [], {"a": [0]}

        def on_fit_start(self):
            type(self).count = COUNT[0] = 0

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            body(self, loss, batch_idx)
            return loss

    return Other


def scaled(factor):
    """Return a step body that adds to the weights what `factor` computes in Python."""

    def body(self, loss, index):
        with torch.no_grad():
            self.net[3].weight.add_(1e-3 * factor(self, index))

    return body


def _set_data(self, loss, index):
    self.net[3].weight.data = self.net[3].weight.data * 0.99


def _count(self, loss, index):
    self.number += 1


def _count_on_class(self, index):
    type(self).count += 1
    return type(self).count


COUNT = [0]


def _count_in_the_file(self, index):
    COUNT[0] = index * 7 if index else COUNT[0] + 1
    return COUNT[0]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda self, loss, index: loss.item(), "a value of a tensor was read"),
        (lambda self, loss, index: self.seen.append(index), "self.seen was changed in place"),
        (lambda self, loss, index: self.table["a"].append(1), "self.table was changed in place"),
        (lambda self, loss, index: random.random(), "Python's random was used"),
        (lambda self, loss, index: setattr(self, "table", {}), "self.table was set to a dict"),
        (lambda self, loss, index: self.log("n", 0.5), "self.log('n', ...) was given a float that Python computed"),
        (lambda self, loss, index: self.trainer.callback_metrics.get("loss"), "trainer.callback_metrics was used"),
        (lambda self, loss, index: torch.manual_seed(index), "torch.manual_seed was called"),
        (lambda self, loss, index: torch.randn(2, generator=torch.Generator()), "from a generator of its own"),
        (_set_data, "got another memory"),
        (scaled(lambda self, index: 0.5 * index), "two steps that should be alike are not"),
        (scaled(_count_on_class), "Other.count was set"),
        (scaled(_count_in_the_file), "two steps that should be alike are not"),
        (scaled(lambda self, index: random.random()), "Python's random was used"),
    ],
)
def test_what_a_replay_would_miss_is_told_and_runs_eagerly(body, reason):
    assert_same(stepping(body), replays=False, reasons=[reason])


def test_a_counter_ends_in_the_limit_of_paths():
    module, _ = assert_same(stepping(_count), epochs=2, replays=False, reasons=["more than 8 ways"])
    assert module.number == 16


def test_the_line_of_the_user_is_told():
    _, told = fit(stepping(lambda self, loss, index: loss.item())())
    assert f"({__file__}:" in told[0]
    assert "loss.item()" in told[0]
    assert "Fix:" in told[0]


def test_hooks_inside_of_the_step_run():
    class Hooked(Model):
        def on_after_backward(self):
            self.losses.append(1.0)

    assert_same(Hooked, replays=False, reasons=["on_after_backward runs inside of the step"])


def test_hooks_of_an_optimizer_run():
    calls = []

    class Hooked(Model):
        def configure_optimizers(self):
            opt = super().configure_optimizers()
            opt.register_step_post_hook(lambda *_: calls.append(1))
            return opt

    fit(Hooked())
    assert len(calls) == 24


def test_a_learning_rate_that_changes_before_the_step_is_used_by_it():
    class Scheduled(Model):
        def configure_optimizers(self):
            opt = super().configure_optimizers()
            return [opt], [torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)]

        def training_step(self, batch, batch_idx):
            if batch_idx or self.current_epoch:
                self.lr_schedulers().step()
            return super().training_step(batch, batch_idx)

    assert_same(Scheduled, replays=False, reasons=["a learning rate was changed before the optimizer stepped"])


def test_batches_of_an_unknown_kind_run_eagerly():
    class Thing:
        def __init__(self, rows):
            self.rows = rows

    class Unpacking(Model):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch.rows, batch_idx)

    assert_same(Unpacking, batches=[Thing(x) for x in data()], replays=False, reasons=["object of type Thing"])


def test_require_raises_instead():
    with pytest.raises(ConfigurationError) as caught:
        fit(stepping(lambda self, loss, index: loss.item())(), compile="require")
    says(caught.value, "a value of a tensor was read", "compile='step'")
    fit(Model(), compile="require")


# ---------------------------------------------------------------- compared in each epoch

FACTOR = [1.0]


class Lying(Model):
    """Computes with a number of the file, which nobody watches."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch * FACTOR[0], batch_idx)


def test_a_step_that_lies_is_caught_by_the_comparison_of_the_next_epoch():
    class Changing(Lying):
        def on_train_epoch_end(self):
            FACTOR[0] = 2.0

    FACTOR[0] = 1.0
    with pytest.raises(ProtocolError) as caught:
        fit(Changing())
    says(caught.value, "aten.mul.Tensor(..., 2.0)", "aten.mul.Tensor(..., 1.0)", "epoch 1")


# ---------------------------------------------------------------- losses, times


@pytest.mark.parametrize("how", ["warn", "stop"])
def test_losses_that_are_not_finite_are_seen_after_a_replay(how):
    batches = data()
    batches[6] = batches[6] * float("nan")
    trainer = Trainer("cpu", max_epochs=1, enable_progress_bar=False, compile="step", nonfinite_loss=how)
    seen = pytest.raises(NonFiniteLossError) if how == "stop" else pytest.warns(UserWarning, match="finite loss")
    with seen, without_inductor():
        trainer.fit(Model(), batches)
    assert trainer.compiled_step.replays > 0


def test_the_slower_of_both_is_dropped(monkeypatch, caplog):
    from xtrain.compiled import path

    monkeypatch.setattr(path, "TRIALS", 2)
    monkeypatch.setattr(path.Path, "ratio", property(lambda self: 1.5))
    caplog.set_level("INFO", "xtrain")
    trainer, _ = fit(Model(), epochs=3)
    step = trainer.compiled_step
    assert (step.replays, step.reasons) == (2, ["a replay takes 1.50 of the time of an eager step"])
    assert "Training steps run eagerly: a replay takes 1.50" in caplog.text


def test_nothing_is_compiled_unasked():
    assert fit(Model(), compile=None)[0].compiled_step is None
