"""Every public name of Lightning can be imported from xtrain, or the ImportError says what to use."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from small import says

import xtrain

LINES = Path(__file__).with_name("lightning_surface.txt").read_text(encoding="utf-8").splitlines()
SURFACE = {place.strip("."): names.split() for place, _, names in (line.partition(":") for line in LINES)}


@pytest.mark.parametrize("root", ["xtrain", "xtrain.pytorch"])
@pytest.mark.parametrize("place", SURFACE)
def test_every_public_name_of_lightning(place, root):
    """`lightning.pytorch` and `lightning` become `xtrain`, whichever of the two a script imports."""
    module = import_module(f"{root}.{place}".strip("."))
    for name in SURFACE[place]:
        try:
            found = getattr(module, name)
        except ImportError as error:
            says(error, name)
        else:
            assert found is not None


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("from xtrain.utilities.types import STEP_OUTPUT, OptimizerLRScheduler, EVAL_DATALOADERS", None),
        ("from xtrain.core import LightningModule", xtrain.LightningModule),
        ("from xtrain.core.module import LightningModule", xtrain.LightningModule),
        ("from xtrain.core.optimizer import LightningOptimizer", xtrain.LightningOptimizer),
        ("from xtrain.utilities import rank_zero_only", xtrain.rank_zero_only),
        ("from xtrain.utilities.rank_zero import rank_zero_only", xtrain.rank_zero_only),
        ("from xtrain.trainer.trainer import Trainer", xtrain.Trainer),
        ("from xtrain.trainer.states import TrainerFn", None),
        ("from xtrain.callbacks.progress.progress_bar import ProgressBar", xtrain.ProgressBar),
        ("from xtrain.utilities.exceptions import MisconfigurationException", xtrain.ConfigurationError),
        ("from xtrain.pytorch import Trainer", xtrain.Trainer),
        ("from xtrain.pytorch.utilities.seed import isolate_rng", None),
        ("import xtrain as pl; rank_zero_only = pl.utilities.rank_zero_only", xtrain.rank_zero_only),
        ("import xtrain as L; Trainer = L.pytorch.trainer.trainer.Trainer", xtrain.Trainer),
    ],
)
def test_paths_that_scripts_use(statement, expected):
    names: dict = {}
    exec(statement, names)
    assert expected is None or expected in names.values()


def test_a_name_that_nobody_has_stays_an_ordinary_error():
    with pytest.raises(ImportError, match="cannot import name"):
        exec("from xtrain import Trianer")
    with pytest.raises(AttributeError, match="Trianer"):
        _ = xtrain.Trianer
    with pytest.raises(ModuleNotFoundError):
        import_module("xtrain.callbacks.nonsense")
    assert not hasattr(xtrain.callbacks, "Nonsense")


def test_nothing_is_made_before_it_is_asked_for():
    code = "import sys, xtrain; print('xtrain.strategies' in sys.modules, 'xtrain.utilities' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
