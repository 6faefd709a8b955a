"""The short form of each recipe: it runs on this leg's backend, ends with its pictures, and has begun to learn."""

from __future__ import annotations

import os

import pytest
from recipes import numbers, run

from xtrain import Trainer, UnsupportedCombinationError

BACKEND = os.environ.get("XTRAIN_RECIPES", "cpu")
"""Each backend is a leg of its own, with the variables it needs."""


@pytest.fixture
def lbfgs():
    """Flags of the recipe that ends with LBFGS: none where a step can run a closure several times."""
    return () if Trainer(BACKEND).backend.capabilities.reevaluating_closures else ("--lbfgs", 0)


def train(name, tmp_path, monkeypatch, capsys, *flags):
    run(name, tmp_path, "--backend", BACKEND, *flags, monkeypatch=monkeypatch)
    return capsys.readouterr().out


def test_gan(tmp_path, monkeypatch, capsys):
    output = train("gan", tmp_path, monkeypatch, capsys)
    before, after, _ = numbers(output, "Fréchet distance")
    assert after < 0.9 * before


def test_wgan_gp(tmp_path, monkeypatch, capsys):
    output = train("wgan_gp", tmp_path, monkeypatch, capsys)
    before, after = numbers(output, "Fréchet distance:")
    assert after < 0.9 * before


def test_ppo(tmp_path, monkeypatch, capsys):
    output = train("ppo", tmp_path, monkeypatch, capsys)
    mean, episodes = numbers(output, "mean return of the last 100 of")[::-1]
    assert 10 < mean < 60
    assert episodes > 5


def test_sparse_coding(tmp_path, monkeypatch, capsys):
    output = train("sparse_coding", tmp_path, monkeypatch, capsys)
    assert numbers(output, "learned")[0] < 0.8 * numbers(output, "random atoms")[0]


def test_cyclegan(tmp_path, monkeypatch, capsys):
    output = train("cyclegan", tmp_path, monkeypatch, capsys)
    before, after = numbers(output, "mean distance from the true bold digit")
    assert after < before


def test_byol(tmp_path, monkeypatch, capsys):
    output = train("byol", tmp_path, monkeypatch, capsys)
    assert numbers(output, "features after training")[0] > 60


def test_maml(tmp_path, monkeypatch, capsys):
    output = train("maml", tmp_path, monkeypatch, capsys)
    first, *_, last = numbers(output, "MAML")
    assert last < first


def test_pinn(lbfgs, tmp_path, monkeypatch, capsys):
    output = train("pinn", tmp_path, monkeypatch, capsys, *lbfgs)
    error = numbers(output, "relative L2 error after Adam:")[0]
    assert error < 0.9
    if not lbfgs:
        assert numbers(output, "relative L2 error after LBFGS:")[0] < error


def test_pinn_says_what_lbfgs_needs(lbfgs, tmp_path, monkeypatch):
    if lbfgs:
        with pytest.raises(UnsupportedCombinationError, match="LBFGS"):
            run("pinn", tmp_path, "--backend", BACKEND, monkeypatch=monkeypatch)
    with pytest.raises(UnsupportedCombinationError, match=r"LBFGS|16-mixed"):
        run("pinn", tmp_path, "--backend", BACKEND, "--precision", "16-mixed", monkeypatch=monkeypatch)
