"""Parameters and state on their way to the device and back: identity, ties, hooks, files, random numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_xla
from torch import nn

from xtrain import Callback, LightningModule, Trainer, errors

torch_xla.device()  # before the first backward of this process

STEPS = 6


class Tied(LightningModule):
    """An autoencoder whose decoder is its encoder's weight; `early` builds the optimizers in ``__init__``."""

    def __init__(self, early: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight
        self.mean = torch.zeros(4, requires_grad=True)  # no module holds it
        self.early = self.make() if early else None

    def make(self) -> Any:
        bias = torch.optim.SGD([self.decoder.bias], lr=0.2)
        rest = torch.optim.Adam([self.encoder.weight], lr=0.01, eps=1e-3)
        rest.add_param_group({"params": [self.mean], "lr": 0.05})
        return bias, rest

    def configure_optimizers(self) -> Any:
        return self.early or self.make()

    def training_step(self, x: torch.Tensor, batch_idx: int) -> None:
        loss = (self.decoder(self.encoder(x - self.mean).tanh()) - x).pow(2).mean()
        for opt in self.optimizers():
            opt.zero_grad()
        self.manual_backward(loss)
        for opt in self.optimizers():
            opt.step()


def data(steps: int = STEPS) -> list[torch.Tensor]:
    return list(torch.randn(steps, 8, 4, generator=torch.Generator().manual_seed(1)))


def fit(module: Any, batches: Any = None, backend: str = "tpu", **options: Any) -> Any:
    Trainer(backend, max_epochs=1, enable_progress_bar=False, **options).fit(module, batches or data())
    return module


def assert_equal(ours: Any, plain: Any, tolerance: float = 1e-6) -> None:
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach(), atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------- identity


@pytest.mark.filterwarnings("ignore:Expected optimizer 1")  # it holds a tensor that is not the module's
@pytest.mark.parametrize("early", [False, True], ids=["built-in-the-run", "built-before"])
def test_tied_weights_and_loose_parameters_train_once(early):
    ours, plain = Tied(early), Tied(early)
    weight, mean = ours.encoder.weight, ours.mean
    fit(ours)
    fit(plain, backend="cpu")
    assert ours.encoder.weight is weight
    assert ours.decoder.weight is weight
    assert ours.mean is mean
    assert weight.device.type == mean.device.type == "xla"
    assert_equal([*ours.parameters(), ours.mean], [*plain.parameters(), plain.mean])


@pytest.mark.filterwarnings("ignore:Expected optimizer 1")
def test_hooks_that_were_registered_before_the_move_run_once_per_backward():
    def hooked() -> tuple[Tied, list[str]]:
        module, calls = Tied(), []
        module.encoder.weight.register_hook(lambda grad: [calls.append("gradient"), grad * 0.5][1])
        module.decoder.bias.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
        return module, calls

    (ours, seen), (plain, expected) = hooked(), hooked()
    fit(ours)
    fit(plain, backend="cpu")
    assert sorted(seen) == sorted(expected) == ["accumulated"] * STEPS + ["gradient"] * STEPS
    assert_equal(ours.parameters(), plain.parameters())


# ---------------------------------------------------------------- bad places


class MovesItself(Tied):
    def __init__(self, move: Any) -> None:
        super().__init__()
        self.move = move

    def setup(self, stage: str) -> None:
        self.move(self)


@pytest.mark.parametrize("move", [lambda m: m.to("cuda"), lambda m: m.cuda(), lambda m: m.encoder.to(device="cuda:0")])
def test_a_module_that_moves_itself_to_a_gpu_is_told_the_line(move):
    with pytest.raises(errors.ConfigurationError) as caught:
        fit(MovesItself(move))
    assert "Expected tensors on the device of the run. Received: a move to cuda" in str(caught.value)
    assert f"at {__file__}:{move.__code__.co_firstlineno}; self.device is the right one" in str(caught.value)


def test_a_module_that_is_on_another_device_already_is_refused():
    module = Tied()
    module.encoder.to("meta")  # the one other device that every machine has
    with pytest.raises(errors.ConfigurationError, match=r"encoder\.weight on the CPU or on xla:0"):
        fit(module)


def test_a_lazy_module_is_refused_until_it_has_seen_a_batch():
    module = Tied()
    module.encoder = nn.LazyLinear(4)
    with pytest.raises(errors.ConfigurationError, match="a lazy module that has seen no batch"):
        fit(module)


# ---------------------------------------------------------------- files


class Noisy(LightningModule):
    """Dropout and two optimizers, so that everything a file must hold counts."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.dropout = nn.Dropout(dropout)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.a.parameters(), lr=0.01), torch.optim.SGD(self.b.parameters(), 0.1, momentum=0.9)

    def training_step(self, x: torch.Tensor, batch_idx: int) -> None:
        for net, opt in zip((self.a, self.b), self.optimizers(), strict=True):
            opt.zero_grad()
            self.manual_backward((net(self.dropout(x)) - x).pow(2).mean())
            opt.step()


class Keep(Callback):
    """Writes everything to `path` after step `at`, or reads it before the first step."""

    def __init__(self, path: Path, at: int | None = None) -> None:
        self.path, self.at = path, at

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == self.at:
            optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
            state = {"module": module.state_dict(), "optimizers": optimizers, "backend": trainer.backend.state_dict()}
            torch.save(trainer.backend.to_cpu(state), self.path)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        if self.at is None:
            state = torch.load(self.path, weights_only=True)
            module.load_state_dict(state["module"])
            for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            trainer.backend.load_state_dict(state["backend"])


def test_training_goes_on_from_a_file_with_the_same_random_numbers(tmp_path):
    whole = fit(Noisy(), callbacks=Keep(tmp_path / "state", at=2))
    torch.manual_seed(99)
    resumed = fit(Noisy(), data()[2:], callbacks=Keep(tmp_path / "state"))
    without = fit(Noisy(dropout=0.4), data()[2:], callbacks=Keep(tmp_path / "state"))
    assert_equal(resumed.parameters(), [p.detach().cpu() for p in whole.parameters()], tolerance=0.0)
    assert not torch.equal(without.a.weight.cpu(), whole.a.weight.cpu())
    state = torch.load(tmp_path / "state", weights_only=True)
    state["backend"]["rng"] += 1
    torch.save(state, tmp_path / "state")
    other = fit(Noisy(), data()[2:], callbacks=Keep(tmp_path / "state"))
    assert not torch.equal(other.a.weight.cpu(), whole.a.weight.cpu()), "the state of the generator decides"


PLAIN = """
import sys, torch
state = torch.load({file!r}, weights_only=True)
a, b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
torch.nn.ModuleDict({{"a": a, "b": b}}).load_state_dict(state["module"])
optimizers = torch.optim.AdamW(a.parameters(), lr=0.5), torch.optim.SGD(b.parameters(), 0.5)
for optimizer, saved in zip(optimizers, state["optimizers"]):
    optimizer.load_state_dict(saved)
for x in torch.load({data!r}):
    for net, optimizer in zip((a, b), optimizers):
        optimizer.zero_grad()
        (net(x) - x).pow(2).mean().backward()
        optimizer.step()
torch.save([p.detach() for net in (a, b) for p in net.parameters()], {out!r})
assert "torch_xla" not in sys.modules
"""


def test_plain_torch_reads_the_file_and_trains_on(tmp_path):
    whole = fit(Noisy(dropout=0.0), callbacks=Keep(tmp_path / "state", at=2))
    torch.save(data()[2:], tmp_path / "data")
    places = {name: str(tmp_path / name) for name in ("data", "out")}
    code = PLAIN.format(file=str(tmp_path / "state"), **places)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_equal(whole.parameters(), torch.load(tmp_path / "out"))
