"""The user's module and data, inside of a child process: made anew for whoever asks, and trained."""

from __future__ import annotations

import copy
import inspect
import itertools
import runpy
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from xtrain.compat.backends import FALLBACK
from xtrain.data.batches import size_of
from xtrain.data.combined import combined
from xtrain.data.datamodule import LightningDataModule
from xtrain.errors import ConfigurationError, explain
from xtrain.hooks import is_overridden
from xtrain.module import LightningModule
from xtrain.rehearsal.arguments import read_init
from xtrain.rehearsal.batches import make_batches
from xtrain.rehearsal.places import noting
from xtrain.seed import seed_everything
from xtrain.trainer import Trainer

_BATCHES = 16  # that --batch makes: an epoch


@dataclass(frozen=True)
class Source:
    """Where the user's module and data come from; it travels to the child as JSON.

    Attributes:
        module: ``"model.py:GAN"``, ``"train.py"`` (a script), or a name for what is in memory.
        data: ``"model.py:loader"``, or empty.
        batch: see `xtrain.rehearsal.batches.make_batches`, or empty.
        init: ``"lr=1e-3"`` or paths of configurations.
        arguments: of a script.
    """

    module: str
    data: str = ""
    batch: str = ""
    init: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()


@dataclass
class Subject:
    """What a check looks at.

    Attributes:
        make: makes the module.
        data: a loader, a DataModule, or None if the module has its own.
        made_up: whether batches are those of ``--batch``, which say nothing about the user's data.
        options: arguments of the user's own Trainer that change what a step is.
    """

    make: Callable[[], LightningModule]
    data: Any = None
    made_up: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def module(self) -> LightningModule:
        """Return a new module, each time with the same parameters; where its layers were made is noted."""
        seed_everything(0)
        with noting():
            return self.make()

    def loader(self, module: LightningModule) -> Any:
        """Return the training loader, for a check that reads it without a Trainer; None if batches are None."""
        owner: Any = self.data if isinstance(self.data, LightningDataModule) else module
        if self.data is not None and owner is not self.data:
            return self.data
        if not hasattr(owner, "train_dataloader"):  # fit(module, steps=...)
            return None
        owner.prepare_data()
        owner.setup("fit")
        return owner.train_dataloader()

    def batches(self, module: LightningModule, count: int) -> list[Any]:
        """Return the first `count` batches, fewer if there are fewer."""
        loader = self.loader(module)
        return [None] * count if loader is None else list(itertools.islice(combined(loader), count))

    def fit(self, module: LightningModule, steps: int, callbacks: Iterable[Any] = (), **options: Any) -> Trainer:
        """Train `module` for `steps` steps, of several epochs if there are fewer batches, and return the Trainer.

        Args:
            module: from `module`.
            steps: training batches.
            callbacks: that watch.
            **options: of the Trainer; default: cpu, 32-true, one device, no logger, bar, validation or sanity check.
                Besides, `ckpt_path`: a checkpoint to go on from.
        """
        ckpt_path = options.pop("ckpt_path", None)
        settings: dict[str, Any] = {
            "backend": FALLBACK, "precision": "32-true", "devices": 1, "logger": False, "enable_progress_bar": False,
            "limit_val_batches": 0, "num_sanity_val_steps": 0, **self.options, **options,
        }  # fmt: skip
        trainer = Trainer(max_epochs=-1, callbacks=list(callbacks), **settings)
        is_module = isinstance(self.data, LightningDataModule)
        given: dict[str, Any] = {"datamodule": self.data} if is_module else {"train_dataloaders": self.data}
        with noting():
            trainer.fit(module, **given, steps=steps, ckpt_path=ckpt_path)
        return trainer


# ---------------------------------------------------------------- where it comes from


def load_subject(source: Source) -> Subject:
    """Import what `source` names, and make a module once, to see that it can be made.

    Raises:
        ConfigurationError: if there is no such thing, it is no module, needs arguments, or there is no data.
        BaseException: whatever the user's code raises.
    """
    with noting():
        return _loaded(source)


def _loaded(source: Source) -> Subject:
    if not _name_in(source.module):
        subject = _script(Path(source.module), source.arguments)
        if not (source.data or source.batch):
            return subject
    else:
        subject = Subject(_maker(load_object(source.module), source.init, source.module))
    if source.batch:
        subject.data, subject.made_up = make_batches(source.batch, _BATCHES), True
        subject.data = None if subject.data[0] is None else subject.data
    elif source.data:
        subject.data = _data(load_object(source.data), source.data)
    module = subject.module()
    if not isinstance(module, LightningModule):
        expected = f"{source.module} to be, or to return, a LightningModule"
        raise ConfigurationError(explain(expected, type(module).__name__, "model.py:GAN"))
    if subject.data is None and not subject.made_up and not is_overridden("train_dataloader", module, LightningModule):
        fix = '--data model.py:loader, --batch "64x3x32x32,64:int", or def train_dataloader(self) in the module'
        raise ConfigurationError(explain(f"batches for {type(module).__name__}", "none", fix))
    return subject


def _name_in(text: str) -> str:
    file, colon, name = text.rpartition(":")
    return name if colon and file and name.isidentifier() else ""


def load_object(text: str) -> Any:
    """Return what ``FILE.py:NAME`` names; the folder of FILE is where its imports are looked for first.

    Raises:
        ConfigurationError: if there is no such file, or no such name in it.
    """
    file, _, name = text.rpartition(":")
    path = Path(file).resolve()
    _check_file(path, text)
    parts = [path.stem]
    folder = path.parent
    while (folder / "__init__.py").is_file():  # a module of a package, with imports of its neighbours
        parts.insert(0, folder.name)
        folder = folder.parent
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    module = import_module(".".join(parts))
    if Path(getattr(module, "__file__", None) or "/").resolve() != path:
        received = f"{path.name}, whose name is that of {getattr(module, '__file__', 'a built-in module')}"
        raise ConfigurationError(explain("a file whose name is not taken", received, f"mv {path.name} my_{path.name}"))
    if not hasattr(module, name):
        known = ", ".join(n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__)
        fix = f"{file}:{known.split(', ')[0]}" if known else None
        raise ConfigurationError(explain(f"{name} in {file}, which has {known or 'nothing'}", "no such name", fix))
    return getattr(module, name)


def _check_file(path: Path, text: str) -> None:
    if not path.is_file() or path.suffix != ".py":
        fix = "xtrain check model.py:GAN"
        raise ConfigurationError(explain("FILE.py:NAME, or a script", f"{text!r} (no such Python file)", fix))


def _maker(found: Any, init: tuple[str, ...], text: str) -> Callable[[], LightningModule]:
    if isinstance(found, LightningModule):
        if init:
            raise ConfigurationError(
                explain("--init with a class or a function", f"an object, {text}", f"--init with {text}")
            )
        return lambda: copy.deepcopy(found)
    if not callable(found):
        raise ConfigurationError(explain(f"{text} to be a LightningModule", type(found).__name__, "model.py:GAN"))
    arguments = read_init(init, found)
    return lambda: found(**arguments)


def _data(found: Any, text: str) -> Any:
    is_loader = isinstance(found, DataLoader) or (hasattr(found, "__iter__") and not isinstance(found, type))
    made = found() if callable(found) and not is_loader and not isinstance(found, LightningDataModule) else found
    if isinstance(made, Dataset) and not hasattr(made, "__iter__"):
        fix = "loader = DataLoader(dataset, batch_size=64)"
        raise ConfigurationError(
            explain(f"{text} to be a loader, a DataModule or a function that returns one", "a dataset", fix)
        )
    if size_of(made) == 0:
        raise ConfigurationError(explain(f"batches in {text}", "none", "DataLoader(dataset, batch_size=64)"))
    return made


class _ReachedError(BaseException):
    """A script came to its ``Trainer.fit``; no ``except Exception`` of the user sees it."""


def _script(path: Path, arguments: tuple[str, ...]) -> Subject:
    """Run a script until it calls ``Trainer.fit``, and return what it gave to it."""
    _check_file(path, str(path))
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    with _instead_of_fit() as caught:
        try:
            runpy.run_path(str(path), run_name="__main__")
        except _ReachedError:
            trainer, call = caught[0]
            return _of_call(trainer, call)
    fix = f"xtrain check {path}:NAME, or trainer.fit(model, loader) in the script"
    raise ConfigurationError(explain(f"{path} to call Trainer.fit", "a script that ends without it", fix))


@contextmanager
def _instead_of_fit() -> Any:
    caught: list[tuple[Trainer, inspect.BoundArguments]] = []
    original = Trainer.fit

    def fit(self: Trainer, *arguments: Any, **options: Any) -> None:
        caught.append((self, inspect.signature(original).bind(self, *arguments, **options)))
        raise _ReachedError

    Trainer.fit = fit  # type: ignore[method-assign]
    try:
        yield caught
    finally:
        Trainer.fit = original  # type: ignore[method-assign]


def _of_call(trainer: Trainer, call: inspect.BoundArguments) -> Subject:
    given = call.arguments
    return in_memory(given["model"], given.get("datamodule") or given.get("train_dataloaders"), trainer)


def in_memory(module: LightningModule, data: Any, trainer: Trainer | None = None) -> Subject:
    """Return the subject of a module that exists: each check gets a deep copy of it.

    Args:
        module: on the CPU.
        data: a loader, a DataModule, or None.
        trainer: whose settings decide what a step is.
    """
    options: dict[str, Any] = {}
    if trainer is not None:
        names = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "step_counting")
        options = {name: getattr(trainer, name) for name in names}
    return Subject(lambda: copy.deepcopy(module), data, options=options)
