"""Warnings that save an afternoon: said once at the start of a training, and only where they are true."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from small import Automatic, Small, loader, rows, says, trained
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, Dataset

from xtrain import ConfigurationError, Trainer


def warned(*arguments, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(*arguments, **options)
    return [str(warning.message) for warning in caught]


def test_layers_in_eval_mode_are_named():
    module = Small()
    module.net.eval()
    (text,) = warned(module=module)
    assert "net in eval mode" in text
    assert warned() == []


def test_a_monitor_that_nobody_reads_is_said():
    class Watches(Small):
        kind = ReduceLROnPlateau

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = StepLR(optimizer, 1) if self.kind is StepLR else ReduceLROnPlateau(optimizer)
            settings = {"scheduler": scheduler, "monitor": "loss"} if self.kind is ReduceLROnPlateau else scheduler
            return {"optimizer": optimizer, "lr_scheduler": settings}

    (text,) = warned(module=Watches())
    assert "monitor='loss'" in text
    Watches.kind = StepLR
    assert warned(module=Watches()) == []


def test_a_step_for_one_of_several_optimizers_is_refused():
    class Old(Automatic):
        def training_step(self, batch, batch_idx, optimizer_idx):
            return self.loss(batch)

    with pytest.raises(ConfigurationError) as caught:
        trained(module=Old())
    says(caught.value, "optimizer_idx", "opt_a, opt_b = self.optimizers()")


class Rows(Dataset):
    def __getitem__(self, index):
        return rows(8)[index]

    def __len__(self):
        return 8


@pytest.mark.parametrize(
    ("cores", "asynchronous", "source", "expected"),
    [
        (8, True, DataLoader(Rows(), 2), True),
        (8, False, DataLoader(Rows(), 2), False),
        (1, True, DataLoader(Rows(), 2), False),
        (8, True, loader(), False),
        (8, True, [rows(2)], False),
    ],
)
def test_a_device_that_waits_for_one_process_is_said(monkeypatch, cores, asynchronous, source, expected):
    cpu = type(Trainer(backend="cpu").backend)
    monkeypatch.setattr(cpu, "capabilities", replace(cpu.capabilities, asynchronous=asynchronous))
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert any("num_workers=0" in text for text in warned(source)) is expected
    assert torch.is_grad_enabled()
