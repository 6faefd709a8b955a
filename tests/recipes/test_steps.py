"""A few steps of each recipe, beside a hand-written loop in plain PyTorch with the same random numbers."""

from __future__ import annotations

import copy
import importlib
import sys

import by_hand
import pytest
import torch
from recipes import EXAMPLES, load

from xtrain import Trainer


def digits(count=3, size=16):
    images, labels = load("common").load_split()[0].tensors
    return [(images[i * size : (i + 1) * size], labels[i * size : (i + 1) * size]) for i in range(count)]


def pairs(count=3, size=16):
    images = [batch for batch, _ in digits(2 * count, size)]
    return [{"plain": (a,), "bold": (-b,)} for a, b in zip(images[:count], images[count:], strict=True)]


def views(count=3):
    images = load("byol").view
    return [(images(batch), images(batch)) for batch, _ in digits(count)]


def points(count=3):
    inside, edge, values = load("pinn").collocation(0)
    return [(inside[i * 64 : (i + 1) * 64], edge[i::8], values[i::8]) for i in range(count)]


def patches(count=3):
    return list(load("sparse_coding").load_patches()[0][: 32 * count].split(32))


# What makes the module, the batches, the loop by hand and its further arguments. Five steps, where the fifth differs.
RECIPES = {
    "gan": (lambda: load("gan").DigitGAN(), digits, by_hand.gan, ()),
    "wgan_gp": (lambda: load("wgan_gp").WGAN(), lambda: digits(5), by_hand.wgan_gp, ()),
    "sparse_coding": (lambda: load("sparse_coding").SparseCoding(), patches, by_hand.sparse_coding, ()),
    "cyclegan": (lambda: load("cyclegan").CycleGAN(), pairs, by_hand.cyclegan, ()),
    "byol": (lambda: load("byol").BYOL(), views, by_hand.byol, ()),
    "pinn": (lambda: load("pinn").HeatEquation(2, 1), points, by_hand.pinn, (2,)),
}


def same(ours, theirs, start, tolerance=1e-5):
    """Check that all parameters and buffers agree, and that the training changed them."""
    moved = False
    for (name, a), b, before in zip(
        ours.state_dict().items(), theirs.state_dict().values(), start.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=f"{name}: {a} != {b}")
        moved |= not torch.equal(a, before)
    assert moved


@pytest.mark.parametrize("name", RECIPES)
def test_steps_are_those_of_a_hand_written_loop(name):
    make, data, loop, more = RECIPES[name]
    module, batches = make(), data()
    reference, start = copy.deepcopy(module), copy.deepcopy(module)
    torch.manual_seed(7)
    Trainer("cpu", max_epochs=1, enable_progress_bar=False).fit(module, batches)
    torch.manual_seed(7)
    loop(reference, batches, *more)
    same(module, reference, start)


def test_meta_learning_differentiates_through_its_inner_step():
    module = load("maml").MAML()
    reference, start = copy.deepcopy(module), copy.deepcopy(module)
    torch.manual_seed(7)
    Trainer("cpu", enable_progress_bar=False).fit(module, steps=3)
    torch.manual_seed(7)
    by_hand.maml(reference, 3)
    same(module, reference, start)


@pytest.mark.parametrize("task", ["CartPole-v1", "Pendulum-v1"])
def test_a_reinforcement_learner_plays_and_learns_as_one_by_hand(task):
    """With the same seed: the same episodes, with the same returns, and the same networks."""
    ppo = load("ppo")
    module = ppo.PPO(task, seed=3)
    module.task = module.task._replace(minibatch=module.task.envs * module.task.horizon // 4)
    minibatches = 4
    reference, start = copy.deepcopy(module), copy.deepcopy(module)
    torch.manual_seed(7)
    Trainer("cpu", enable_progress_bar=False).fit(module, steps=2 * module.task.passes * minibatches)
    torch.manual_seed(7)
    world = ppo.World(task, module.task.envs, 3)
    by_hand.ppo(reference, world, 2)
    assert world.returns == module.world.returns
    assert len(world.returns) > 5
    same(module, reference, start)


@pytest.mark.parametrize(
    ("recipe", "missing"), [("ppo", "gymnasium"), ("gan", "sklearn.datasets"), ("byol", "matplotlib")]
)
def test_what_is_missing_is_told_with_the_line_that_installs_it(recipe, missing, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setitem(sys.modules, missing, None)
    for name in ("common", recipe):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit, match=rf"{missing}.*pip install 'xtrain-torch\[examples\]'"):
        importlib.import_module(recipe)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_a_recipe_is_read_in_one_go(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= (250 if path.stem == "common" else 200)
