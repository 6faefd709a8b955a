"""A module written for Lightning runs after its import is changed, and trains what it says.

Lightning itself (2.6.6) was run on the same source: its parameters equal those below to 1e-6.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small import assert_equal, loader, trainer
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR

SOURCE = Path(__file__).with_name("written_for_lightning.py").read_text(encoding="utf-8")
PAGE = Path(__file__).parent.parent.joinpath("docs", "moving.md").read_text(encoding="utf-8")
# The change that the page "Moving over" asks for.
THEIRS, OURS = (re.search(rf"^ *\{sign}import (\S+) as pl$", PAGE, re.MULTILINE)[1] for sign in "-+")
EPOCHS = 4


@pytest.fixture(scope="module")
def ported():
    assert THEIRS == "lightning.pytorch"
    assert SOURCE.count(THEIRS) == 1
    names: dict = {}
    exec(compile(SOURCE.replace(THEIRS, OURS), "written_for_lightning.py", "exec"), names)
    return SimpleNamespace(**names)


def start(kind):
    torch.manual_seed(7)
    return kind()


def batches():
    return ((epoch, index, batch) for epoch in range(EPOCHS) for index, batch in enumerate(loader()))


def check(kind, by_hand):
    module, reference = start(kind), start(kind)
    trainer(max_epochs=EPOCHS).fit(module, loader())
    by_hand(reference)
    assert_equal(module, reference)
    return module


def test_gan(ported):
    def by_hand(gan):
        g, d = gan.generator, gan.discriminator
        g_opt = torch.optim.Adam(g.parameters(), lr=0.01, betas=(0.5, 0.999))
        d_opt = torch.optim.SGD(d.parameters(), lr=0.01, momentum=0.9)
        g_sch, d_sch = ExponentialLR(g_opt, 0.9), StepLR(d_opt, 1, 0.5)
        real = torch.ones(2, 1)
        for epoch, index, batch in batches():
            z = torch.sin(torch.arange(4) + epoch + index).view(2, 2)
            g_opt.zero_grad()
            cross_entropy(d(g(z)), real).backward()
            g_opt.step()
            d_opt.zero_grad()
            (cross_entropy(d(batch), real) + cross_entropy(d(g(z).detach()), 1 - real)).backward()
            nn.utils.clip_grad_norm_(d.parameters(), 0.1)
            d_opt.step()
            g_sch.step()
            if index == 3 and epoch % 2:
                d_sch.step()

    module = check(ported.GAN, by_hand)
    assert module.hparams == {"latent": 2, "lr": 0.01}
    assert set(module.trainer.callback_metrics) == {"g_loss", "d_loss"}


def test_lbfgs(ported):
    def by_hand(module):
        optimizer = torch.optim.LBFGS(module.parameters(), lr=0.5, max_iter=3)
        for _, _, batch in batches():

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = (module.layer(batch) - batch.sum(1, keepdim=True)).pow(2).mean()
                loss.backward()
                return loss

            optimizer.step(closure)

    check(ported.Fit, by_hand)


@pytest.mark.filterwarnings("ignore:Expected no monitor of a scheduler")
def test_accumulation_and_plateau(ported):
    rates = []

    def by_hand(module):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.3)
        schedule = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)
        losses = []
        for _, index, batch in batches():
            loss = (module.layer(batch) - 1).pow(2).mean()
            losses.append(loss.item())
            (loss / 2).backward()
            if index % 2:
                nn.utils.clip_grad_value_(module.parameters(), 0.05)
                optimizer.step()
                optimizer.zero_grad()
            if index == 3:
                schedule.step(sum(losses) / 4)
                losses.clear()
                rates.append(optimizer.param_groups[0]["lr"])

    check(ported.Accumulate, by_hand)
    assert len(set(rates)) > 1  # the schedule took part
