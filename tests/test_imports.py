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


@pytest.mark.parametrize(
    ("statement", "advice"),
    [
        ("from xtrain.loggers import CometLogger as Theirs", "xtrain.loggers.Logger"),
        ("from xtrain.accelerators import MPSAccelerator as Theirs", "Trainer(backend="),
        ("from xtrain.callbacks import StochasticWeightAveraging as Theirs", "WeightAveraging"),
        ("from xtrain.tuner import Tuner as Theirs", "Trainer(max_steps=100)"),
        ("import xtrain as pl; Theirs = pl.callbacks.DeviceStatsMonitor", "max_memory_allocated"),
    ],
)
def test_a_class_that_only_lightning_has_can_be_named_but_not_used(statement, advice):
    """Types and `isinstance` are what most scripts need it for; whoever makes one or derives from it is told."""
    names: dict = {}
    exec(statement, names)
    theirs = names["Theirs"]
    assert not isinstance(xtrain.Trainer(), theirs)
    assert theirs is not None
    assert not isinstance(xtrain.loggers.CSVLogger("."), (theirs, str))
    for use in (lambda: theirs(1, save_dir="."), lambda: type("Mine", (theirs,), {})):
        with pytest.raises(xtrain.ConfigurationError) as caught:
            use()
        says(caught.value, theirs.__name__, advice)
    with pytest.raises(AttributeError) as missing:
        theirs.is_available()
    says(missing.value, theirs.__name__, advice)


def test_names_of_its_examples(capsys):
    names: dict = {}
    exec("from xtrain import cli_lightning_logo\nfrom xtrain.utilities.imports import _TORCHVISION_AVAILABLE", names)
    exec("from xtrain.utilities.imports import _TORCH_AVAILABLE, _NOTHING_OF_THAT_NAME_AVAILABLE", names)
    names["cli_lightning_logo"]()
    assert capsys.readouterr().out == "xtrain\n"
    assert names["_TORCH_AVAILABLE"]
    assert not names["_NOTHING_OF_THAT_NAME_AVAILABLE"]


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
