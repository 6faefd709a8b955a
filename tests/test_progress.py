"""The progress bar and the callback base: what is shown, where, and that it waits for nothing."""

from __future__ import annotations

import inspect
import io
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from xtrain import Callback, ConfigurationError, LightningModule, ProgressBar, Trainer
from xtrain.callbacks import RichProgressBar, TQDMProgressBar
from xtrain.callbacks.base import hook_names
from xtrain.hooks import ModuleHooks


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_state(**changes):
    """What the bar reads of a Trainer."""
    state = {
        "is_global_zero": True,
        "max_epochs": 3,
        "current_epoch": 1,
        "total_batches": 12,
        "progress": SimpleNamespace(batches=4),
        "backend": SimpleNamespace(first_step=""),
        "sanity_checking": False,
        "training": True,
        "progress_bar_metrics": {},
        "num_sanity_val_batches": [2],
        "num_val_batches": [2],
        "num_test_batches": [1, 1],
        "num_predict_batches": [float("inf")],
    }
    return SimpleNamespace(**{**state, **changes})


def show_epoch(bar, state, batches=4):
    module = torch.nn.Module()
    bar.setup(state, module, "fit")
    bar.on_train_epoch_start(state, module)
    for index in range(batches):
        state.progress_bar_metrics["loss"] = 0.5 - index / 10
        bar.on_train_batch_end(state, module, None, None, index)
    bar.on_train_epoch_end(state, module)
    bar.on_train_end(state, module)
    bar.teardown(state, module, "fit")


def test_a_terminal_sees_batches_of_all_epochs_and_metrics(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    show_epoch(ProgressBar(refresh_seconds=0.0), run_state())
    drawn = terminal.getvalue().split("\r")
    assert any(re.search(r"Epoch 2/3:\s+50%.* 6/12 .*loss=0\.4\]", line) for line in drawn)
    assert re.search(r"Epoch 2/3:\s+67%.* 8/12 .*loss=0\.2\]", drawn[-1])
    assert drawn[-1].endswith("\n")


def test_a_log_file_sees_no_bar_but_a_line_per_epoch(capsys):
    show_epoch(ProgressBar(), run_state())
    captured = capsys.readouterr()
    assert re.fullmatch(r"Epoch 2/3: 8/12 \[\d\d:\d\d<\d\d:\d\d, loss=0\.2\]\n", captured.err)
    assert captured.out == ""


def test_a_log_file_is_written_now_and_then(capsys):
    show_epoch(ProgressBar(refresh_seconds=0.0), run_state())
    lines = capsys.readouterr().err.splitlines()
    assert [re.search(r" (\d)/12 ", line)[1] for line in lines] == ["5", "6", "7", "8"]


def test_refresh_rate_counts_batches(capsys):
    show_epoch(ProgressBar(refresh_rate=2, refresh_seconds=0.0), run_state())
    assert re.findall(r" (\d)/12 ", capsys.readouterr().err) == ["6", "8"]
    show_epoch(ProgressBar(refresh_rate=0), run_state())
    bar = ProgressBar()
    bar.disable()
    show_epoch(bar, run_state())
    assert capsys.readouterr().err == ""
    bar.enable()
    show_epoch(bar, run_state())
    assert "8/12" in capsys.readouterr().err
    with pytest.raises(ConfigurationError, match=r"ProgressBar\(refresh_rate=1\)"):
        ProgressBar(refresh_rate=-1)


def test_get_metrics_may_be_overridden(capsys):
    class Mine(TQDMProgressBar):
        def get_metrics(self, trainer, pl_module):
            items = super().get_metrics(trainer, pl_module)
            items.pop("loss")
            return {**items, "size": 7}

    state = run_state()
    show_epoch(Mine(), state)
    assert ", size=7]" in (said := capsys.readouterr().err)
    assert "loss" not in said
    assert "loss" in state.progress_bar_metrics


def test_finished_epochs_may_leave_a_line(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    show_epoch(ProgressBar(leave=True), run_state())
    kept = [line.split("\r")[-1] for line in terminal.getvalue().split("\n")]
    assert ["8/12" in line for line in kept] == [True, True, False]


def test_a_backend_says_what_its_first_steps_wait_for(capsys):
    state = run_state(backend=SimpleNamespace(first_step="compiling the first graph, about a minute"))
    show_epoch(ProgressBar(), state)
    first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"Epoch 2/3: 4/12 \[.*, compiling the first graph, about a minute\]", first)
    assert "compiling" not in last


def test_other_ranks_are_silent(capsys):
    show_epoch(ProgressBar(refresh_seconds=0.0), run_state(is_global_zero=False))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("max_epochs", [None, -1])
def test_unknown_lengths(capsys, max_epochs):
    show_epoch(ProgressBar(), run_state(max_epochs=max_epochs, total_batches=float("inf")))
    assert re.match(r"Epoch 2: 8it \[", capsys.readouterr().err)


def test_between_drawings_the_metrics_are_not_even_looked_at():
    class Untouchable:
        def __getattr__(self, name):
            raise AssertionError(f"trainer.{name} was read for a batch")

    bar, module = ProgressBar(refresh_seconds=3600.0), torch.nn.Module()
    state = run_state()
    bar.setup(state, module, "fit")
    bar.on_train_epoch_start(state, module)
    for index in range(3):
        bar.on_train_batch_end(Untouchable(), module, None, None, index)
    bar.teardown(state, module, "fit")


@pytest.mark.parametrize(
    ("kind", "title", "changes"),
    [
        ("validation", "Validation", {"training": False}),
        ("validation", "Sanity check", {"sanity_checking": True, "training": False}),
        ("test", "Testing", {"training": False}),
        ("predict", "Predicting", {"training": False}),
    ],
)
def test_evaluation_has_its_bar(capsys, kind, title, changes):
    bar, module, state = ProgressBar(), torch.nn.Module(), run_state(**changes)
    bar.setup(state, module, "validate")
    getattr(bar, f"on_{kind}_start")(state, module)
    for index in range(2):
        getattr(bar, f"on_{kind}_batch_end")(state, module, None, None, index, 0)
    getattr(bar, f"on_{kind}_end")(state, module)
    total = "2it [" if kind == "predict" else "2/2 ["
    assert capsys.readouterr().err.startswith(f"{title}: {total}")


def test_validation_inside_of_an_epoch_does_not_end_its_bar(capsys):
    bar, module, state = ProgressBar(refresh_seconds=0.0), torch.nn.Module(), run_state()
    bar.setup(state, module, "fit")
    bar.on_train_epoch_start(state, module)
    bar.on_train_batch_end(state, module, None, None, 0)
    bar.on_validation_start(state, module)
    bar.on_validation_batch_end(state, module, None, None, 0)
    bar.on_validation_end(state, module)
    bar.on_train_batch_end(state, module, None, None, 1)
    bar.teardown(state, module, "fit")
    titles = [line.split(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert titles == ["Epoch 2/3", "Validation", "Epoch 2/3"]


def test_text_is_written_above_the_bar(capsys):
    bar, module, state = ProgressBar(), torch.nn.Module(), run_state()
    bar.print("before")
    bar.setup(state, module, "fit")
    bar.on_train_epoch_start(state, module)
    bar.print("during")
    bar.teardown(state, module, "fit")
    assert capsys.readouterr().out == "before\nduring\n"


def test_a_narrow_terminal_keeps_the_metrics(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    show_epoch(ProgressBar(refresh_seconds=0.0), run_state())
    last = terminal.getvalue().split("\r")[-1]
    assert re.match(r"Epoch 2/3 8/12, loss=0\.2 \[00:00\]", last)


# ---------------------------------------------------------------- in a Trainer


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = torch.nn.Linear(2, 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.net(batch).square().mean()
        self.manual_backward(loss)
        optimizer.step()
        self.log("loss", loss, prog_bar=True)
        if batch_idx == 1:
            self.print("hello")

    def validation_step(self, batch, batch_idx):
        self.log("val", torch.tensor(2.5), prog_bar=True)


def fit(**options):
    data = torch.utils.data.DataLoader(torch.randn(12, 2), batch_size=4)
    trainer = Trainer("cpu", max_epochs=2, log_every_n_steps=1, **options)
    trainer.fit(Regression(), data, data)


def test_a_training_shows_its_epochs_with_their_metrics(capsys):
    fit()
    captured = capsys.readouterr()
    epochs = [line for line in captured.err.splitlines() if line.startswith("Epoch")]
    assert [re.match(r"Epoch \d/2: (\d)/6 .*loss=\S+, val=2\.5\]$", line)[1] for line in epochs] == ["3", "6"]
    assert captured.out == "hello\nhello\n"


INTRODUCTION = "xtrain: backend=cpu (given); precision=32-true (default); processes=1 (no launcher); parameters=3"


def test_a_training_without_progress_bar_says_one_line_and_what_the_module_is(capsys):
    fit(enable_progress_bar=False)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == INTRODUCTION
    assert lines[-2:] == [
        "3 parameters (3 trainable, 0 frozen)",
        "0.0 MB on cpu (cpu, 32-true): 0.0 parameters + 0.0 gradients",
    ]
    fit(enable_progress_bar=False, enable_model_summary=False)
    assert capsys.readouterr().err.splitlines() == [INTRODUCTION]


def test_a_bare_training_is_silent(capsys):
    Trainer("cpu", max_epochs=1, barebones=True).fit(Regression(), [torch.ones(1, 2)])
    assert capsys.readouterr().err == ""


def test_every_run_begins_with_one_line(capsys):
    trainer = Trainer("cpu", max_epochs=1, enable_progress_bar=False)
    module, data = Regression(), [torch.ones(1, 2)]
    trainer.validate(module, data)
    assert capsys.readouterr().err.splitlines() == [INTRODUCTION]
    module.net.bias.requires_grad_(False)
    trainer.validate(module, data)
    assert capsys.readouterr().err.splitlines() == [f"{INTRODUCTION} (2 trainable)"]


def test_one_bar_for_all_epochs_validations_leave_no_line(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    fit(callbacks=ProgressBar(refresh_seconds=0.0), enable_model_summary=False)
    screen = [line.split("\r")[-1].replace("\x1b[A", "") for line in terminal.getvalue().split("\n")]
    left = [line for line in screen if line.strip() and not line.startswith("xtrain: ")]
    assert re.search(r"Validation: +50%.* 1/3 ", terminal.getvalue()) or "1/3" in terminal.getvalue()
    assert re.search(r"Epoch 2/2: 100%.* 6/6 \[.*loss=\S+, val=2\.5\]", left[-1])


@pytest.mark.parametrize(
    ("options", "steps", "total"),
    [
        ({"max_epochs": 3}, None, 12),
        ({"max_epochs": 3, "max_steps": 5}, None, 5),
        ({"max_steps": 5}, None, 5),
        ({"max_epochs": 3, "limit_train_batches": 2}, None, 6),
        ({"max_epochs": 3}, 7, 7),
        ({"max_epochs": -1}, None, float("inf")),
    ],
)
def test_the_total_is_that_of_the_whole_fit(options, steps, total):
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append(trainer.total_batches)
            trainer.should_stop = len(seen) > 20

    trainer = Trainer("cpu", callbacks=Watch(), enable_progress_bar=False, **options)
    trainer.fit(Regression(), [torch.ones(1, 2)] * 4, steps=steps)
    assert seen[0] == total
    assert total in (float("inf"), trainer.progress.batches)


def test_an_exception_leaves_the_terminal_in_order(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)

    class Broken(Regression):
        def validation_step(self, batch, batch_idx):
            raise ZeroDivisionError

    data = torch.utils.data.DataLoader(torch.randn(12, 2), batch_size=4)
    bar = ProgressBar(refresh_seconds=0.0)
    with pytest.raises(ZeroDivisionError):
        Trainer("cpu", max_epochs=1, num_sanity_val_steps=0, callbacks=bar).fit(Broken(), data, data)
    assert terminal.getvalue().endswith("\n")
    assert bar._bars == []


# ---------------------------------------------------------------- the base class


def test_callbacks_have_the_hooks_of_modules_with_the_trainer_in_front():
    both = ("setup", "teardown")
    own = {n: method for n, method in vars(ModuleHooks).items() if n in both or n.startswith("on_")}
    shared = {n: method for n, method in own.items() if "_model_" not in n}  # how a module changes its own modes
    assert len(shared) > 30
    for name, method in shared.items():
        own = list(inspect.signature(method).parameters)
        theirs = list(inspect.signature(getattr(Callback, name)).parameters)
        assert theirs == ["self", "trainer", "module", *own[1:]], name


def test_every_hook_does_nothing_and_says_when_it_runs():
    callback = Callback()
    for name in hook_names():
        method = getattr(Callback, name)
        parameters = list(inspect.signature(method).parameters.values())[1:]
        result = getattr(callback, name)(*[None for p in parameters if p.default is p.empty])
        assert result is None
        assert method.__doc__


class Gone(Terminal):
    """A terminal that is closed after some writes."""

    def __init__(self, writes, error):
        super().__init__()
        self.left, self.error = writes, error

    def write(self, text):
        if self.left == 0:
            raise self.error
        self.left -= 1
        return super().write(text)


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "Input/output error"), ValueError("closed file")])
@pytest.mark.parametrize("writes", [0, 2, 5])
def test_a_terminal_that_goes_away_takes_no_training_with_it(monkeypatch, writes, error):
    monkeypatch.setattr("sys.stderr", Gone(writes, error))
    trainer = Trainer("cpu", max_epochs=2, callbacks=ProgressBar(refresh_seconds=0.0))
    trainer.fit(Regression(), [torch.ones(1, 2)] * 3, [torch.ones(1, 2)] * 2)
    assert trainer.global_step == 6


@pytest.mark.parametrize("missing", ["sys.stderr", "sys.stdout"])
def test_without_stderr_or_stdout_nothing_is_shown(monkeypatch, missing):
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setattr(missing, None)
    trainer = Trainer("cpu", max_epochs=1)
    trainer.fit(Regression(), [torch.ones(1, 2)] * 3)
    assert trainer.global_step == 3


def test_epochs_end_with_their_last_values(capsys):
    class Late(Regression):
        def on_train_epoch_end(self):
            self.log("late", float(self.current_epoch), prog_bar=True)

    data = torch.utils.data.DataLoader(torch.randn(12, 2), batch_size=4)
    Trainer("cpu", max_epochs=3, enable_model_summary=False).fit(Late(), data, data)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == INTRODUCTION
    assert [re.search(r"late=(\S+)\]", line)[1] for line in lines[1:]] == ["0", "1", "2"]
    assert all("loss=" in line and "val=2.5" in line for line in lines[1:])


def test_rich_shows_the_same(capsys, monkeypatch):
    terminal = Terminal()
    data = torch.utils.data.DataLoader(torch.randn(12, 2), batch_size=4)
    bar = RichProgressBar(refresh_rate=1, refresh_seconds=0.0, leave=True, console_kwargs={"width": 120})
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", terminal)
        Trainer("cpu", max_epochs=2, log_every_n_steps=1, callbacks=bar).fit(Regression(), data, data)
    drawn = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())
    for line in (r"Epoch 1/2 .* 3/6 .*loss=\S+", r"Epoch 2/2 .* 6/6 .*loss=\S+, val=2\.5", r"Epoch 1/2 3 loss="):
        assert re.search(line, drawn), line
    assert "hello" in drawn
    bar.print("after")
    assert capsys.readouterr().out == "after\n"
    assert RichProgressBar in [type(c) for c in Trainer("cpu", callbacks=bar).callbacks]
    assert ProgressBar not in [type(c) for c in Trainer("cpu", callbacks=bar).callbacks]


def test_rich_writes_lines_where_there_is_no_terminal(capsys):
    Trainer("cpu", max_epochs=2, callbacks=RichProgressBar()).fit(Regression(), [torch.ones(1, 2)] * 3)
    assert re.findall(r"^Epoch \d/2: (\d/6) \[", capsys.readouterr().err, re.MULTILINE) == ["3/6", "6/6"]


def test_rich_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ImportError, match=r"pip install 'xtrain-torch\[rich\]'"):
        RichProgressBar()
