"""How many calls lie between what a user writes and what runs: a stack trace must fit on a screen.

A hop is one call from a frame of xtrain or of a backend; decorators and torch itself are not counted.
"""

import sys
from pathlib import Path

import pytest
import torch

from xtrain import LightningModule, Trainer

ROOT = Path(__file__).resolve().parent.parent
OURS = (str(ROOT / "xtrain"), str(ROOT / "backends"))


def hops() -> list[str]:
    """Return the functions of ours between the caller and the code of this file that is next above it, inmost first."""
    names, frame = [], sys._getframe(2)
    while frame is not None and frame.f_code.co_filename != __file__:
        if frame.f_code.co_filename.startswith(OURS):
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    assert frame is not None, "nothing of this file is above the caller"
    return names


class Traced(torch.optim.SGD):
    """Notes the way to its step."""

    def step(self, closure=None):
        self.way = hops()
        return super().step(closure)


class Recorder(LightningModule):
    """Notes the way to each verb."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(2, 1)
        self.way: dict[str, list[str]] = {}

    def training_step(self, batch, batch_idx):
        self.way["training_step"] = hops()
        loss = self.layer(batch).float().mean() / 1000  # small enough for the first loss scale: the step is applied
        loss.register_hook(lambda grad: self.way.update(backward=hops()))
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.way["step"] = optimizer.optimizer.way

    def configure_optimizers(self):
        return Traced(self.parameters(), lr=0.1)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true"])
def test_manual_step_is_near_its_user(precision):
    module = Recorder()
    Trainer(backend="cpu", precision=precision, max_steps=1, enable_progress_bar=False).fit(module, [torch.ones(3, 2)])
    assert (module.way["training_step"][-1], module.way["backward"][-1]) == ("fit", "manual_backward")
    assert len(module.way["training_step"]) <= 3, module.way
    assert len(module.way["backward"]) <= 2, module.way
    assert len(module.way["step"]) <= 2, module.way
