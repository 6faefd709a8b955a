"""`LightningCLI`: a command line from the signatures of a module, a DataModule and the Trainer, by jsonargparse."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch.optim import Optimizer, lr_scheduler

from xtrain.callbacks.base import Callback
from xtrain.data.datamodule import LightningDataModule
from xtrain.errors import ConfigurationError, MissingDependencyError, explain
from xtrain.module import LightningModule
from xtrain.seed import seed_everything
from xtrain.trainer import Trainer

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

ArgsType: TypeAlias = Sequence[str] | Mapping[str, Any] | None
_COMMANDS = {
    "fit": "train the module",
    "validate": "run its validation_step over the validation data",
    "test": "run its test_step over the test data",
    "predict": "run its predict_step",
}
# Option, class and the argument that only the module can give.
_OPTIMIZATION = (("optimizer", Optimizer, "params"), ("lr_scheduler", lr_scheduler.LRScheduler, "optimizer"))
# What the command line makes itself, or what only code can give.
_FROM_CLI = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}


class SaveConfigCallback(Callback):
    """Writes the configuration of a training beside its logs, so that ``--config`` can repeat it.

    Args:
        parser: made the configuration.
        config: the configuration.
        config_filename: the name of the file.
        overwrite: replace a file of that name; otherwise it is an error.

    Raises:
        ConfigurationError: when training starts, if the file exists.
    """

    def __init__(
        self, parser: ArgumentParser, config: Namespace, config_filename: str = "config.yaml", overwrite: bool = False
    ) -> None:
        self.parser, self.config = parser, config
        self.config_filename, self.overwrite = config_filename, overwrite

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Write the file, on rank 0."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        folders = [getattr(logger, "log_dir", None) for logger in trainer.loggers]
        path = Path(next((f for f in folders if f), trainer.default_root_dir)) / self.config_filename
        if path.exists() and not self.overwrite:
            fix = "LightningCLI(..., save_config_kwargs={'overwrite': True}), or save_config_callback=None"
            raise ConfigurationError(explain("no configuration of an earlier run", f"{path} exists", fix))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, str(path), skip_unset=False, overwrite=True, multifile=False)


class ReduceLROnPlateau(lr_scheduler.ReduceLROnPlateau):
    """Torch's, which also knows what it watches: ``--lr_scheduler xtrain.cli.ReduceLROnPlateau``.

    Args:
        optimizer: whose learning rate it changes.
        monitor: the name of a logged metric.
        **options: those of torch's class.
    """

    def __init__(self, optimizer: Optimizer, monitor: str, **options: Any) -> None:
        super().__init__(optimizer, **options)
        self.monitor = monitor


class LightningCLI:
    """Reads ``fit --model.lr 1e-3 --trainer.backend tpu --config c.yaml``, and runs it.

    Every argument of the module's ``__init__`` is an option ``--model.NAME``, typed and documented as there;
    so are ``--data.NAME`` and ``--trainer.NAME``. ``--config`` reads a YAML file of all of them, and
    ``--print_config`` writes one. ``--optimizer Adam --optimizer.lr 0.01`` and ``--lr_scheduler StepLR
    --lr_scheduler.step_size 10`` take the place of the module's ``configure_optimizers``.

    Args:
        model_class: the module's class.
        datamodule_class: the DataModule's, if there is one.
        save_config_callback: writes ``config.yaml`` beside the logs; None for no file.
        save_config_kwargs: passed on to it.
        trainer_class: the class of the Trainer.
        trainer_defaults: arguments of the Trainer that the command line may change.
        seed_everything_default: the default of ``--seed_everything``: a seed, True for 0, or False for none.
        parser_kwargs: passed on to `jsonargparse.ArgumentParser`.
        subclass_mode_model: ``--model`` takes any class derived from `model_class`.
        subclass_mode_data: ``--data`` takes any class derived from `datamodule_class`.
        args: what follows the command's name, or a configuration as a dict; default: `sys.argv`.
        run: False makes `trainer`, `model` and `datamodule` only, and has no subcommands.

    Attributes:
        parser: the parser; add links and options in `add_arguments_to_parser`.
        config: what was read.
        trainer: the Trainer.
        model: the module.
        datamodule: the DataModule, or None.

    Raises:
        MissingDependencyError: if jsonargparse is not installed.

    Example:
        >>> LightningCLI(Model, args=["fit", "--model.lr", "0.1", "--trainer.max_epochs", "3"])  # doctest: +SKIP
    """

    def __init__(
        self,
        model_class: type[LightningModule] = LightningModule,
        datamodule_class: type[LightningDataModule] | None = None,
        save_config_callback: type[SaveConfigCallback] | None = SaveConfigCallback,
        save_config_kwargs: dict[str, Any] | None = None,
        trainer_class: type[Trainer] = Trainer,
        trainer_defaults: dict[str, Any] | None = None,
        seed_everything_default: bool | int = True,
        parser_kwargs: dict[str, Any] | None = None,
        subclass_mode_model: bool = False,
        subclass_mode_data: bool = False,
        args: ArgsType = None,
        run: bool = True,
    ) -> None:
        self.model_class, self.datamodule_class, self.trainer_class = model_class, datamodule_class, trainer_class
        self.trainer_defaults = dict(trainer_defaults or {})
        self._subclasses = {"model": subclass_mode_model or model_class is LightningModule, "data": subclass_mode_data}
        self._seed = int(seed_everything_default) if seed_everything_default is not True else 0
        self._seeded = seed_everything_default is not False
        self._parser_kwargs = dict(parser_kwargs or {})
        self._save = (save_config_callback, dict(save_config_kwargs or {}))
        self.parser = self._make_parser(run)
        self.config = (
            self.parser.parse_object(dict(args)) if isinstance(args, Mapping) else self.parser.parse_args(args)
        )
        self.subcommand: str | None = self.config.get("subcommand") if run else None
        self._instantiate()
        if self.subcommand is not None:
            self._run(self.subcommand)

    def add_arguments_to_parser(self, parser: ArgumentParser) -> None:
        """Override it to add options and links: ``parser.link_arguments("data.width", "model.width")``."""

    def before_instantiate_classes(self) -> None:
        """Override it to look at, or change, `config` before anything is made of it."""

    # ---------------------------------------------------------------- the parser

    def _make_parser(self, run: bool) -> ArgumentParser:
        try:
            from jsonargparse import ArgumentParser
        except ImportError as error:
            text = "LightningCLI needs the jsonargparse package: pip install 'xtrain-torch[cli]'"
            raise MissingDependencyError(text) from error
        parser = ArgumentParser(**self._parser_kwargs)
        if not run:
            self._add_options(parser)
            return parser
        commands = parser.add_subcommands(required=True, dest="subcommand")
        for name, text in _COMMANDS.items():
            child = ArgumentParser(description=text)
            self._add_options(child)
            known = set(inspect.signature(getattr(self.trainer_class, name)).parameters)
            child.add_method_arguments(self.trainer_class, name, skip=known & _FROM_CLI)
            commands.add_subcommand(name, child, help=text)
        return parser

    def _add_options(self, parser: ArgumentParser) -> None:
        parser.add_argument("--config", action="config", help="a YAML file of options")
        kind: Any = int | bool | None
        parser.add_argument(
            "--seed_everything", type=kind, default=self._seed if self._seeded else False, help="a seed"
        )
        parser.add_class_arguments(self.trainer_class, "trainer", instantiate=False)
        parser.set_defaults({f"trainer.{name}": value for name, value in self.trainer_defaults.items()})
        self._add_class(parser, "model", self.model_class)
        if self.datamodule_class is not None:
            self._add_class(parser, "data", self.datamodule_class)
        for name, kind, skipped in _OPTIMIZATION:
            parser.add_subclass_arguments(
                kind, name, skip={skipped}, instantiate=False, required=False, fail_untyped=False
            )
        self.add_arguments_to_parser(parser)

    def _add_class(self, parser: ArgumentParser, name: str, cls: type) -> None:
        if self._subclasses[name]:
            parser.add_subclass_arguments(cls, name, required=True, fail_untyped=False)
        else:
            parser.add_class_arguments(cls, name, fail_untyped=False)

    # ---------------------------------------------------------------- what it makes

    def _instantiate(self) -> None:
        self.before_instantiate_classes()
        chosen = self.config if self.subcommand is None else self.config[self.subcommand]
        if chosen.seed_everything is not False and chosen.seed_everything is not None:
            seed_everything(int(chosen.seed_everything), workers=True)
        parser = self.parser if self.subcommand is None else self._child(self.subcommand)
        made = parser.instantiate(chosen)
        self.model: LightningModule = made["model"]
        self.datamodule: LightningDataModule | None = made.get("data")
        self._set_optimizers(chosen)
        self.trainer = self.trainer_class(**self._trainer_arguments(parser, chosen, made["trainer"]))
        self._made = made

    def _set_optimizers(self, config: Namespace) -> None:
        """Put what the command line says about optimizer and scheduler in the place of the module's own."""
        optimizer, scheduler = config.get("optimizer"), config.get("lr_scheduler")
        if optimizer is None and scheduler is not None:
            fix = "--optimizer Adam beside --lr_scheduler"
            raise ConfigurationError(explain("an optimizer for --lr_scheduler", "none", fix))
        if optimizer is not None:
            self.model.configure_optimizers = partial(_configure, self.model, optimizer, scheduler)  # type: ignore[method-assign]

    def _child(self, name: str) -> ArgumentParser:
        return self.parser._subcommands_action._name_parser_map[name]  # type: ignore[union-attr,no-any-return]

    def _trainer_arguments(self, parser: ArgumentParser, config: Namespace, made: Any) -> dict[str, Any]:
        arguments = dict(vars(made))
        save, options = self._save
        if save is not None:
            given = arguments.get("callbacks") or []
            callbacks = list(given) if isinstance(given, list | tuple) else [given]
            arguments["callbacks"] = [*callbacks, save(parser, config, **options)]
        return arguments

    def _run(self, name: str) -> None:
        method = getattr(self.trainer, name)
        known = set(inspect.signature(method).parameters) - _FROM_CLI - {"self"}
        data = {} if self.datamodule is None else {"datamodule": self.datamodule}
        method(self.model, **data, **{key: self._made[key] for key in known})


def _configure(model: LightningModule, optimizer: Namespace, scheduler: Namespace | None) -> Any:
    """Do what ``configure_optimizers`` does, as the command line says."""
    made = _of_class(optimizer, (p for p in model.parameters() if p.requires_grad))
    if scheduler is None:
        return made
    schedule = _of_class(scheduler, made)
    settings = {"scheduler": schedule, "monitor": schedule.monitor} if hasattr(schedule, "monitor") else schedule
    return {"optimizer": made, "lr_scheduler": settings}


def _of_class(config: Namespace, first: Any) -> Any:
    module, name = config.class_path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)(first, **vars(config.get("init_args") or config.__class__()))
