"""Arguments of the Trainer that few trainings need: what they mean, and where they take effect.

The Trainer takes them by keyword and keeps them as `Options`; nothing here runs in a step unless it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypedDict

from xtrain.checks import check_choice, check_count, check_limit, check_switch
from xtrain.errors import ConfigurationError, explain

if TYPE_CHECKING:
    from xtrain.callbacks.base import Callback


class OptionArguments(TypedDict, total=False):
    """The keyword arguments of a Trainer that `Options` reads."""

    min_epochs: int | None
    min_steps: int | None
    max_time: str | timedelta | dict[str, float] | None
    overfit_batches: int | float | None
    reload_dataloaders_every_n_epochs: int | None
    use_distributed_sampler: bool | None
    num_nodes: int | None
    sync_batchnorm: bool | None
    deterministic: bool | str | None
    benchmark: bool | None
    detect_anomaly: bool | None
    profiler: Any
    enable_model_summary: bool | None
    barebones: bool | None
    fused: bool | None
    compile: str | None


@dataclass(frozen=True)
class Options:
    """What a Trainer was told beyond its signature.

    Attributes:
        min_epochs: epochs before anybody may stop the training.
        min_steps: training steps before anybody may stop the training.
        max_time: see `xtrain.callbacks.Timer`.
        overfit_batches: train and validate on so many batches (or that fraction), without shuffling.
        reload_dataloaders_every_n_epochs: ask module or DataModule for its loaders again so often; 0 is never.
        use_distributed_sampler: split loaders over the ranks.
        num_nodes: hosts that the launcher must have started processes on.
        sync_batchnorm: share the statistics of batch norm over the ranks.
        deterministic: True, or "warn": `torch.use_deterministic_algorithms` during a run.
        benchmark: `torch.backends.cudnn.benchmark` during a run; None leaves it as it is.
        detect_anomaly: `torch.autograd.detect_anomaly` during a fit: slow, names the forward of a NaN.
        profiler: see `xtrain.callbacks.Profiler`; True, or one of Lightning's names, takes its defaults.
        enable_model_summary: print a `xtrain.callbacks.ModelSummary` when a training starts.
        barebones: no logger, bar, summary or sanity check, nothing read from the device: to measure the training alone.
        fused: let optimizers that torch can fuse (Adam, AdamW, SGD, Adagrad) update all parameters in one call, unless
            their ``fused`` or ``foreach`` was chosen. Faster for small networks; results differ in the last bits.
        compile: "networks" compiles the forward of each network, "step" whole training steps; what cannot be compiled
            runs eagerly and says why, or raises with "require".
    """

    min_epochs: int = 0
    min_steps: int = 0
    max_time: Any = None
    overfit_batches: int | float = 0
    reload_dataloaders_every_n_epochs: int = 0
    use_distributed_sampler: bool = True
    num_nodes: int | None = None
    sync_batchnorm: bool = False
    deterministic: bool | str = False
    benchmark: bool | None = None
    detect_anomaly: bool = False
    profiler: Any = None
    enable_model_summary: bool | None = None
    barebones: bool = False
    fused: bool = False
    compile: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before a run.

        Raises:
            ConfigurationError: for an argument that means nothing.
        """
        check_count("min_epochs", self.min_epochs, 0)
        check_count("min_steps", self.min_steps, 0)
        check_count("num_nodes", self.num_nodes, 1)
        check_count("reload_dataloaders_every_n_epochs", self.reload_dataloaders_every_n_epochs, 0)
        check_limit("overfit_batches", self.overfit_batches)
        check_switch("fused", self.fused)
        check_choice("compile", self.compile, "networks", "step", "require")
        if not isinstance(self.deterministic, bool):
            check_choice("deterministic", self.deterministic, "warn")
        if self.deterministic:  # cuBLAS reads it when it starts
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def callbacks(self, given: list[Callback]) -> list[Callback]:
        """Return the callbacks that some of the options are, beside those that were given."""
        from xtrain.callbacks.profiler import as_profiler
        from xtrain.callbacks.summary import ModelSummary
        from xtrain.callbacks.timer import Timer

        wanted = self.enable_model_summary is not False and not self.barebones
        own = any(isinstance(callback, ModelSummary) for callback in given)
        found: list[Callback] = [ModelSummary()] if wanted and not own else []
        if self.max_time is not None:
            found.append(Timer(self.max_time))
        if self.profiler not in (None, False):
            found.append(as_profiler(self.profiler))
        return found

    def bare(self, logger: Any, bar: bool | None, sanity: int | None, every: int | None) -> tuple[Any, Any, Any, Any]:
        """Return these arguments of the Trainer, those of a bare training if that is asked for.

        Raises:
            ConfigurationError: if one of them was given, too.
        """
        if not self.barebones:
            return logger, bar, sanity, every
        given = {
            "logger": logger,
            "enable_progress_bar": bar,
            "num_sanity_val_steps": sanity,
            "log_every_n_steps": every,
            "enable_model_summary": self.enable_model_summary,
        }
        wanted = ", ".join(f"{name}={value!r}" for name, value in given.items() if value)
        if wanted:
            raise ConfigurationError(explain("barebones=True alone", wanted, "Trainer(barebones=True)"))
        return None, False, 0, 0

    def may_stop(self, epochs: int, steps: int) -> bool:
        """Return whether a training of so many epochs and steps may end early."""
        return epochs >= self.min_epochs and steps >= self.min_steps


def read_options(given: Mapping[str, Any]) -> tuple[Options, dict[str, Any]]:
    """Return the options among keyword arguments of a Trainer, and the rest. None is the default of each."""
    known = {field.name for field in fields(Options)}
    chosen = {name: value for name, value in given.items() if name in known and value is not None}
    return Options(**chosen), {name: value for name, value in given.items() if name not in known}
