"""Import paths of Lightning: what xtrain has is found under them, for the rest the ImportError says what to use.

A script that says ``xtrain`` where it said ``lightning.pytorch`` imports ``xtrain.utilities.rank_zero``,
``xtrain.callbacks.early_stopping`` and the like. Modules that xtrain does not have under that path are made when
they are asked for; their names come from the tables below. `install` runs once, at ``import xtrain``.

A class that only Lightning has can be imported, since most scripts name it in a type or in ``isinstance`` alone;
whoever makes one, derives from it or asks it for something reads what to use.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache, partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from xtrain.compat.hints import HINTS, PLACES
from xtrain.errors import ConfigurationError, explain

ROOT = __name__.partition(".")[0]

# Names of Lightning by the module that has them here; after a colon the name they have there.
HERE: dict[str, str] = {
    **dict.fromkeys(("Callback", "LightningDataModule", "LightningModule", "Trainer", "seed_everything"), ""),
    **dict.fromkeys(("LightningOptimizer", "rank_zero_only"), ""),
    **dict.fromkeys(("CSVLogger", "Logger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"), "loggers"),
    **dict.fromkeys(("EMAWeightAveraging", "EarlyStopping", "LambdaCallback", "LearningRateMonitor"), "callbacks"),
    **dict.fromkeys(("BasePredictionWriter", "RichProgressBar"), "callbacks"),
    **dict.fromkeys(("BoringDataModule", "BoringModel", "DemoModel"), "demos.boring_classes"),
    **dict.fromkeys(("ManualOptimBoringModel", "RandomDataset", "RandomDictDataset"), "demos.boring_classes"),
    **dict.fromkeys(("RandomIterableDataset", "RandomIterableDatasetWithLen"), "demos.boring_classes"),
    "EarlyStoppingReason": "callbacks.early_stopping",
    "RichProgressBarTheme": "callbacks.rich_progress",
    "WriteInterval": "callbacks.prediction_writer",
    **dict.fromkeys(("ModelSummary", "ProgressBar", "Timer", "WeightAveraging"), "callbacks"),
    **dict.fromkeys(("ArgsType", "LightningCLI", "SaveConfigCallback"), "cli"),
    **dict.fromkeys(("RunningStage", "TrainerFn", "TrainerState", "TrainerStatus"), "stages"),
    **dict.fromkeys(("LRSchedulerConfigType", "OptimizerConfig", "OptimizerLRSchedulerConfig"), "utilities.types"),
    **dict.fromkeys(("LRSchedulerPLType", "LRSchedulerTypeTuple", "LRSchedulerTypeUnion"), "utilities.types"),
    **dict.fromkeys(("EVAL_DATALOADERS", "OptimizerLRScheduler", "STEP_OUTPUT"), "utilities.types"),
    **dict.fromkeys(("LRSchedulerType", "TRAIN_DATALOADERS"), "utilities.types"),
    **dict.fromkeys(("DDPStrategy", "DeepSpeedStrategy", "FSDPStrategy", "ParallelStrategy"), "compat.strategies"),
    **dict.fromkeys(("SingleDeviceStrategy", "SingleDeviceXLAStrategy", "Strategy"), "compat.strategies"),
    **dict.fromkeys(("Accelerator", "CPUAccelerator", "CUDAAccelerator", "XLAAccelerator"), "compat.strategies"),
    "XLAStrategy": "compat.strategies",
    "cli_lightning_logo": "compat.imports",
    "AttributeDict": "hparams:HyperParameters",
    "HyperparametersMixin": "hparams:KeepsHyperParameters",
    "DataHooks": "hooks:BatchHooks",
    "DummyLogger": "loggers.silent:SilentLogger",
    "LRSchedulerConfig": "configure",
    "MisconfigurationException": "errors:ConfigurationError",
    "ModelHooks": "hooks:ModuleHooks",
}


def install() -> None:
    """Let Python's import system ask `find`, also for what the modules that are imported already lack."""
    sys.meta_path.append(_Finder())  # last: asked only where nothing else is found
    for place in ("", *PLACES):
        name = f"{ROOT}.{place}".rstrip(".")
        if name in sys.modules:
            complete(name)


def complete(name: str) -> None:
    """Let the module `name`, which xtrain has, answer for what Lightning has in its module of that name."""
    module = vars(sys.modules[name])
    module.setdefault("__getattr__", partial(find, name.partition(".")[2]))
    module.setdefault("__path__", [])  # Lightning has modules below it


def find(place: str, name: str) -> Any:
    """Return what Lightning's `name` in its module `place` is here.

    Args:
        place: the path of the module without ``lightning.pytorch.``.
        name: what is imported from it.

    Raises:
        ImportError: for a function that only Lightning has; it says what xtrain has instead, as its classes do.
        AttributeError: for a name that neither of them has.
    """
    if name.startswith("__"):
        raise AttributeError(name)
    below = f"{place}.{name}".lstrip(".")
    if below in PLACES or below == "pytorch":
        return import_module(f"{ROOT}.{below}")
    for module in _from_inner_to_outer(place):
        if name in vars(module):
            return vars(module)[name]
    if name in HERE:
        source, _, attribute = HERE[name].partition(":")
        return getattr(import_module(f"{ROOT}.{source}".rstrip(".")), attribute or name)
    if place == "utilities.imports" and name.endswith("_AVAILABLE"):
        return find_spec(name.removesuffix("_AVAILABLE").strip("_").lower()) is not None
    hint = HINTS.get(name) or PLACES.get(place)
    if hint is None:
        raise AttributeError(f"module {f'{ROOT}.{place}'.rstrip('.')!r} has no attribute {name!r}")
    explanation = explain(f"a name that {ROOT} has", f"{name}, which only Lightning has ({place or ROOT})", hint)
    if name[0].isupper() and not name.isupper():
        return absent_class(name, explanation)
    raise ImportError(explanation)


def cli_lightning_logo() -> None:
    """Print one line with the name of the library, where Lightning's examples print a logo."""
    print(ROOT)


def in_place_of(value: Any) -> str | None:
    """Return the line that imports xtrain's class in place of Lightning's, of which `value` is one; None for others."""
    for cls in type(value).__mro__:
        root, *place = cls.__module__.split(".")
        if root in ("lightning", "pytorch_lightning"):
            within = next((part for part in place if part in ("callbacks", "loggers", "strategies")), "")
            return f"from {f'{ROOT}.{within}'.rstrip('.')} import {cls.__name__}  # not from {root}"
    return None


class AbsentClass(type):
    """The type of the classes that only Lightning has: nothing is an instance of them, and using one raises.

    Attributes:
        explanation: what to use instead.
    """

    explanation: str

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse to make an object.

        Raises:
            ConfigurationError: always; it says what to use.
        """
        raise ConfigurationError(cls.explanation)

    def __getattr__(cls, name: str) -> Any:
        """Refuse an attribute of the class, such as ``MPSAccelerator.is_available``.

        Raises:
            AttributeError: always; it says what to use.
        """
        raise AttributeError(cls.explanation)


@cache
def absent_class(name: str, explanation: str) -> type:
    """Return the class that stands for Lightning's class `name`, which is not here.

    Args:
        name: its name.
        explanation: the text of the error of whoever uses it.
    """

    def derive(cls: Any, /, **kwargs: Any) -> None:
        raise ConfigurationError(explanation)

    body = {"explanation": explanation, "__doc__": explanation, "__init_subclass__": classmethod(derive)}
    return AbsentClass(name, (), body)


def _from_inner_to_outer(place: str) -> list[ModuleType]:
    """Return the modules on the way to `place` that exist here, the innermost first, without the outermost."""
    parts = place.split(".")
    names = [f"{ROOT}.{'.'.join(parts[:count])}" for count in range(len(parts), 0, -1)]
    return [sys.modules[name] for name in names if isinstance(sys.modules.get(name), ModuleType)]


class _Finder(MetaPathFinder, Loader):
    """Finds the modules of Lightning that are not here, and makes them."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        """Return the spec of a module of Lightning, None for any other."""
        root, _, place = fullname.partition(".")
        inner = place.removeprefix("pytorch").removeprefix(".")
        if root != ROOT or not (place in PLACES or (place != inner and (not inner or inner in PLACES))):
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> None:
        """Let Python make an ordinary, empty module."""

    def exec_module(self, module: ModuleType) -> None:
        """Give the empty module a look-up instead of contents."""
        place = module.__name__.partition(".")[2]
        if place.split(".")[0] == "pytorch":  # `import lightning` became `import xtrain`
            place = place.removeprefix("pytorch").removeprefix(".")
        vars(module)["__getattr__"] = partial(find, place)
