"""What user code reads from Lightning's Trainer beside the settings, on top of what xtrain's own Trainer knows."""

from __future__ import annotations

import math
from typing import Any

from xtrain.callbacks.base import Callback
from xtrain.callbacks.early_stopping import EarlyStopping
from xtrain.callbacks.progress import ProgressBar
from xtrain.compat.loops import FitLoop
from xtrain.compat.strategies import Accelerator, Strategy, accelerator_of, strategy_of
from xtrain.data.batches import limited, size_of
from xtrain.errors import ConfigurationError, explain
from xtrain.launch.join import current_launch
from xtrain.stages import RunningStage, TrainerFn, TrainerState, TrainerStatus

_STAGES = {
    "fit": RunningStage.TRAINING,
    "validate": RunningStage.VALIDATING,
    "test": RunningStage.TESTING,
    "predict": RunningStage.PREDICTING,
    "sanity": RunningStage.SANITY_CHECKING,
}

# Attributes of Lightning's Trainer that are not here, and what says the same.
_INSTEAD = {
    "ckpt_path": "the path that you gave",
    "distributed_sampler_kwargs": "nothing: a DataLoader is split over the processes",
    "init_module": "with torch.device('meta'): in configure_model",
    "profiler": "with torch.profiler.record_function('name'): ...; Trainer(profiler=...) records a trace",
    "precision_plugin": "trainer.precision, trainer.backend",
    "predict_loop": "trainer.predict_dataloaders, trainer.num_predict_batches",
    "received_sigterm": "signal.signal(signal.SIGTERM, ...)",
    "scaler": "trainer.backend.scaler",
    "test_loop": "trainer.test_dataloaders, trainer.num_test_batches",
    "tuner": "a loop of your own over Trainer(max_steps=100)",
    "validate_loop": "trainer.val_dataloaders, trainer.num_val_batches",
}


class LightningAttributes:
    """Views on a Trainer, which derives from this, under Lightning's names; nothing is kept here."""

    def __getattr__(self, name: str) -> Any:
        """Say what is there instead of an attribute that only Lightning's Trainer has.

        The error is no AttributeError, which torch would hide if it came out of a property of a module.
        """
        if name in _INSTEAD:
            raise ConfigurationError(explain("an attribute of xtrain's Trainer", f"trainer.{name}", _INSTEAD[name]))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # ---------------------------------------------------------------- what runs

    @property
    def state(self: Any) -> TrainerState:
        """How the current or last call stands: its status, what was called and which loop runs."""
        run = self.run
        if run is None:
            return TrainerState()
        if run.active:
            return TrainerState(TrainerStatus.RUNNING, TrainerFn(run.called), _STAGES[run.stage])
        status = TrainerStatus.INTERRUPTED if run.failed else TrainerStatus.FINISHED
        return TrainerState(status, TrainerFn(run.called))

    @property
    def interrupted(self: Any) -> bool:
        """Whether the last call ended by an exception, Ctrl-C included."""
        return self.state.status is TrainerStatus.INTERRUPTED

    @property
    def evaluating(self: Any) -> bool:
        """Whether validation (the sanity check included) or testing runs."""
        return self.stage in ("validate", "sanity", "test")

    @property
    def fit_loop(self: Any) -> FitLoop:
        """The counters of the training under the names of Lightning's loops."""
        return FitLoop(self)

    @property
    def strategy(self: Any) -> Strategy:
        """Which kind of training runs, by the class of Lightning's name."""
        return strategy_of(self)

    @property
    def accelerator(self: Any) -> Accelerator:
        """The kind of device, by the class of Lightning's name."""
        return accelerator_of(self.backend.device)

    @property
    def model(self: Any) -> Any:
        """The module of the current or last run, None before the first; no wrapper is around it."""
        run = self.run
        return None if run is None else run.module

    min_epochs = property(lambda self: self.options.min_epochs, doc="Epochs before anybody may stop the training.")
    min_steps = property(lambda self: self.options.min_steps, doc="Training steps before that.")
    enable_autolog_hparams = True
    reload_dataloaders_every_n_epochs = property(
        lambda self: self.options.reload_dataloaders_every_n_epochs,
        doc="Epochs between two new loaders.",
    )
    overfit_batches = property(lambda self: self.options.overfit_batches, doc="What it trains and validates on.")
    barebones = property(lambda self: self.options.barebones, doc="Whether nothing but the training runs.")

    # ---------------------------------------------------------------- where it runs

    @property
    def log_dir(self: Any) -> str:
        """The folder of the first logger's run, of `default_root_dir` without one; the same on every rank."""
        logger = self.logger
        folder = None if logger is None else getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None)
        return str(self.broadcast(folder or self.default_root_dir))

    @property
    def num_devices(self: Any) -> int:
        """Devices that this host takes part with."""
        return len(self.device_ids)

    @property
    def device_ids(self: Any) -> list[int]:
        """Their numbers; before a run, as many as were asked for."""
        asked = 1 if self.run is not None else self.backend.devices or 1
        return list(range(current_launch().local_world_size or max(self.world_size, asked)))

    @property
    def num_nodes(self: Any) -> int:
        """Hosts that take part."""
        return max(int(self.world_size // self.num_devices), 1)

    @property
    def node_rank(self: Any) -> int:
        """This host, from 0."""
        return int(self.global_rank // self.num_devices)

    # ---------------------------------------------------------------- loaders

    @property
    def train_dataloader(self: Any) -> Any:
        """The training loader of the current or last fit, or the collection of them; None without one."""
        run = self.run
        loader = None if run is None else run.plan.loader
        combined = getattr(loader, "combined", None)
        return loader if combined is None else combined.iterables

    @property
    def val_dataloaders(self: Any) -> Any:
        """The validation loader, the list of several, or None."""
        return self._loaders("validate")

    @property
    def test_dataloaders(self: Any) -> Any:
        """The test loader, the list of several, or None."""
        return self._loaders("test")

    @property
    def predict_dataloaders(self: Any) -> Any:
        """The loader for prediction, the list of several, or None."""
        return self._loaders("predict")

    @property
    def num_val_batches(self: Any) -> list[int | float]:
        """Validation batches per loader; infinity where a loader does not know."""
        return list(self._sizes("validate", self.limit_val_batches))

    @property
    def num_test_batches(self: Any) -> list[int | float]:
        """Test batches per loader."""
        return list(self._sizes("test", self.limit_test_batches))

    @property
    def num_predict_batches(self: Any) -> list[int | float]:
        """Batches to predict per loader."""
        return list(self._sizes("predict", self.limit_predict_batches))

    @property
    def num_sanity_val_batches(self: Any) -> list[int | float]:
        """Batches of the check before training per loader."""
        run = self.run
        return [] if run is None or run.called != "fit" else self._sizes("validate", run.plan.sanity_batches)

    @property
    def enable_validation(self: Any) -> bool:
        """Whether a fit validates."""
        return bool(self.num_val_batches)

    def _loaders(self: Any, stage: str) -> Any:
        run = self.run
        found = [] if run is None else run.loaders.get(stage, [])
        return (found[0] if len(found) == 1 else found) if found else None

    def _sizes(self: Any, stage: str, limit: int | float | None) -> list[int | float]:
        run = self.run
        sizes = [] if run is None else [size_of(loader) for loader in run.loaders.get(stage, [])]
        counts = [limited(size, limit, "the limit") for size in sizes]
        return [math.inf if count is None else count for count in counts]

    # ---------------------------------------------------------------- callbacks

    @property
    def progress_bar_callback(self: Any) -> ProgressBar | None:
        """The progress bar, if there is one."""
        return next(iter(self._callbacks(ProgressBar)), None)

    @property
    def early_stopping_callback(self: Any) -> EarlyStopping | None:
        """The first `EarlyStopping`, if there is one."""
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def early_stopping_callbacks(self: Any) -> list[EarlyStopping]:
        """Every `EarlyStopping`."""
        return list(self._callbacks(EarlyStopping))

    def _callbacks(self: Any, kind: type[Callback]) -> list[Any]:
        return [callback for callback in self.callbacks if isinstance(callback, kind)]
