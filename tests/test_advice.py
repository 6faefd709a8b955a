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


def test_an_epoch_without_a_log_point_is_said(tmp_path):
    def told(every, **options):
        texts = warned(log_every_n_steps=every, default_root_dir=tmp_path, **options)
        return [text for text in texts if "log_every_n_steps" in text]

    (text,) = told(5, logger=True)
    assert "at most the 4 batches of an epoch. Received: 5" in text
    assert told(4, logger=True) == told(5) == told(5, logger=True, fast_dev_run=2) == []


def test_a_training_without_an_end_is_said():
    class Stops(Small):
        def on_train_epoch_end(self):
            self.trainer.should_stop = True

    def told(**options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Trainer("cpu", enable_progress_bar=False, **options).fit(Stops(), loader())
        return [str(warning.message) for warning in caught]

    (text,) = told()
    assert "it trains 1000 epochs" in text
    assert "max_epochs=-1" in text
    assert told(max_epochs=-1) == told(max_steps=3) == told(max_epochs=5) == []


def test_a_step_without_a_loss_is_said_once():
    class Sometimes(Automatic):
        def training_step(self, batch, batch_idx):
            return None if batch_idx else super().training_step(batch, batch_idx)

    (text,) = warned(module=Sometimes())
    assert "a loss from training_step. Received: None" in text
