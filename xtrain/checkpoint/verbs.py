"""What users call on a Trainer to save, and how a fit finds what it goes on from."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from xtrain.callbacks.checkpoint import FOLDER, ModelCheckpoint
from xtrain.checkpoint.finding import agreed, find, read_checkpoint
from xtrain.checkpoint.places import Place, place
from xtrain.checkpoint.resume import Resumption, check_parts
from xtrain.checkpoint.saving import Background, Writing, save
from xtrain.checkpoint.state import run_of
from xtrain.errors import ConfigurationError, explain
from xtrain.run.state import Run, TrainerState


class CheckpointVerbs(TrainerState):
    """The part of a `Trainer` that saves and loads."""

    default_root_dir: str

    def save_checkpoint(self, filepath: str | os.PathLike[str], weights_only: bool = False) -> None:
        """Write a checkpoint, a folder; all ranks must call it. It is complete when this returns.

        Args:
            filepath: the folder to make, also a URL of fsspec. One of the same name is replaced, on a disk in one move.
            weights_only: leave out what only a training needs.

        Raises:
            ProtocolError: before any run.
            CheckpointError: if it cannot be written, or holds what could not be read back.

        Example:
            >>> trainer.save_checkpoint("model.ckpt")
            >>> Trainer(max_epochs=3, enable_progress_bar=False).fit(module, data, ckpt_path="model.ckpt")
        """
        run = run_of(self.run)
        fit = self.last_fit  # after it the module may have been tested: its optimizers are those of the fit
        if fit is not None and fit.module is run.module and not (run.active or weights_only):
            run = fit
        save(run, place(filepath), weights_only)

    @property
    def checkpoint_callbacks(self) -> list[ModelCheckpoint]:
        """The callbacks that save."""
        return [callback for callback in self.callbacks if isinstance(callback, ModelCheckpoint)]

    @property
    def checkpoint_callback(self) -> ModelCheckpoint | None:
        """The first callback that saves."""
        return next(iter(self.checkpoint_callbacks), None)

    def _write_checkpoint(
        self, path: Place, weights_only: bool, background: bool, exception: bool
    ) -> Background | None:
        """Write for a callback; returns the thread if it goes on in the background."""
        background = background and not exception
        writing = Writing(run_of(self.run), path, weights_only, {"exception": True} if exception else None, background)
        if background:
            return Background(writing)
        writing.write()
        writing.finish()
        return None

    def _resumption(self, ckpt_path: Any, load: Any, weights_only: bool | None) -> Callable[[Run], Resumption | None]:
        """Return what finds and reads the checkpoint of ``ckpt_path`` once the ranks are there."""
        parts = check_parts(load)
        if load is not None and ckpt_path is None:
            fix = "trainer.fit(model, ckpt_path='last', load=('module', 'optimizers'))"
            raise ConfigurationError(explain("a ckpt_path to load parts of", "none", fix))

        def begin(run: Run) -> Resumption | None:
            if ckpt_path is None:
                return None
            savers = self.checkpoint_callbacks
            wanted = ckpt_path if ckpt_path in ("last", "best") else place(ckpt_path)
            usual = place(self.default_root_dir) / FOLDER
            folders = [place(c.given_dirpath or usual) for c in savers] or [usual]
            best = [c.best_model_path for c in savers]
            source = agreed(lambda: find(wanted, folders, best), run)
            if source is None:
                return None
            resumption = Resumption(run, read_checkpoint(source, weights_only), parts)
            resumption.load_loggers()
            return resumption

        return begin


def with_model_checkpoint(callbacks: list[Any], enabled: bool | None) -> list[Any]:
    """Return the callbacks of a Trainer, with one that saves if that is asked for.

    Raises:
        ConfigurationError: if saving is switched off and a callback saves.
    """
    savers = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    if enabled is False and savers:
        fix = "Trainer(callbacks=[ModelCheckpoint(...)]), which saves without enable_checkpointing"
        raise ConfigurationError(explain("no ModelCheckpoint with enable_checkpointing=False", "one", fix))
    return [*callbacks, ModelCheckpoint()] if enabled and not savers else callbacks
