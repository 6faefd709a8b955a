"""The progress bar and the callback base: what is shown, where, and that it waits for nothing."""

from __future__ import annotations

import inspect
import io
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from xtrain import Callback, LightningModule, ProgressBar, Trainer
from xtrain.callbacks import RichProgressBar
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
        "num_training_batches": 4,
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
    bar.teardown(state, module, "fit")


def test_a_terminal_sees_epoch_batches_and_metrics(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    show_epoch(ProgressBar(refresh_seconds=0.0), run_state())
    drawn = terminal.getvalue().split("\r")
    assert any(re.search(r"Epoch 2/3:\s+50%.* 2/4 .*loss=0\.4\]", line) for line in drawn)
    assert re.search(r"Epoch 2/3: 100%.* 4/4 .*loss=0\.2\]", drawn[-1])
    assert drawn[-1].endswith("\n")


def test_a_log_file_sees_whole_lines_and_few_of_them(capsys):
    show_epoch(ProgressBar(), run_state())
    captured = capsys.readouterr()
    assert re.fullmatch(
        r"Epoch 2/3: 100%\S* 4/4 \[.*loss=0\.2\]\n", captured.err.replace("|##########|", "##########|")
    )
    assert captured.out == ""


def test_a_log_file_is_written_now_and_then(capsys):
    show_epoch(ProgressBar(refresh_seconds=0.0), run_state())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert [re.search(r" (\d)/4 ", line)[1] for line in lines] == ["1", "2", "3", "4", "4"]


def test_other_ranks_are_silent(capsys):
    show_epoch(ProgressBar(refresh_seconds=0.0), run_state(is_global_zero=False))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("max_epochs", [None, -1])
def test_unknown_lengths(capsys, max_epochs):
    show_epoch(ProgressBar(), run_state(max_epochs=max_epochs, num_training_batches=float("inf")))
    assert re.match(r"Epoch 2: 4it \[", capsys.readouterr().err)


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
    total = "2it [" if kind == "predict" else "100%"
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
    assert titles == ["Epoch 2/3", "Validation", "Epoch 2/3", "Epoch 2/3"]


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
    assert re.match(r"Epoch 2/3 4/4, loss=0\.2 \[00:00\]", last)


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
    assert [re.match(r"Epoch (\d)/2: 100%.* 3/3 .*loss=\S+, val=2\.5\]$", line)[1] for line in epochs] == ["1", "2"]
    assert captured.out == "hello\nhello\n"


def test_a_training_without_progress_bar_is_silent(capsys):
    fit(enable_progress_bar=False)
    assert capsys.readouterr().err == ""


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


def test_a_fit_begins_with_one_line_and_ends_its_epochs_with_their_last_values(capsys):
    class Late(Regression):
        def on_train_epoch_end(self):
            self.log("late", float(self.current_epoch), prog_bar=True)

    data = torch.utils.data.DataLoader(torch.randn(12, 2), batch_size=4)
    Trainer("cpu", max_epochs=3).fit(Late(), data, data)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "xtrain: cpu, 32-true, 1 process, 3 parameters"
    assert [re.search(r"late=(\S+)\]", line)[1] for line in lines[1:]] == ["0", "1", "2"]
    assert [" left in all)" in line for line in lines[1:]] == [False, True, False]
    assert all("loss=" in line and "val=2.5" in line for line in lines[1:])


def test_rich_shows_the_same(capsys):
    data = torch.utils.data.DataLoader(torch.randn(12, 2), batch_size=4)
    bar = RichProgressBar(refresh_seconds=0.0)
    Trainer("cpu", max_epochs=2, log_every_n_steps=1, callbacks=bar).fit(Regression(), data, data)
    captured = capsys.readouterr()
    for epoch in ("1", "2"):
        assert re.search(rf"Epoch {epoch}/2 .* 3/3 .*loss=\S+, val=2\.5", captured.err)
    assert "hello" in captured.err
    bar.print("after")
    assert capsys.readouterr().out == "after\n"
    assert [type(c) for c in Trainer("cpu", callbacks=bar).callbacks] == [RichProgressBar]


def test_rich_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ImportError, match=r"pip install 'xtrain-torch\[rich\]'"):
        RichProgressBar()
