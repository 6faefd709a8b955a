"""A progress bar that costs nothing per step: it looks at the clock, and draws when it is time."""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any

from torch.nn.parameter import is_lazy

from xtrain.callbacks.base import Callback

if TYPE_CHECKING:
    from xtrain.module import LightningModule
    from xtrain.trainer import Trainer

_SECONDS_IN_A_TERMINAL = 0.1
_SECONDS_IN_A_LOG_FILE = 10.0
_NARROW = 80  # columns
_SHORT = "{desc} {n_fmt}/{total_fmt}{postfix} [{remaining}]"  # the bar gives way to the metrics


class ProgressBar(Callback):
    """Shows epochs, batches and the metrics logged with ``prog_bar=True``, on rank 0, on stderr.

    Metrics are those that a log point has read already, so the bar never waits for the device. Where
    stderr is a file or a pipe, a line is written now and then, and one per epoch.

    Args:
        refresh_seconds: time between two drawings; default: 0.1 in a terminal, else 10.
        leave: keep the bars of finished epochs on the screen.

    Example:
        >>> trainer = Trainer(callbacks=[ProgressBar(refresh_seconds=1.0, leave=False)])
    """

    after_module = True  # what the module logs at the end of an epoch is on the bar

    def __init__(self, refresh_seconds: float | None = None, leave: bool = True) -> None:
        self._fitting, self._first_epoch, self._began = False, 0, 0.0
        self._seconds = refresh_seconds
        self._leave = leave
        self._shown = False
        self._bars: list[Any] = []  # the last one is drawn: validation runs inside of an epoch

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Find out whether this process shows anything."""
        self._fitting = stage == "fit"
        self._shown = trainer.is_global_zero and sys.stderr is not None  # pythonw and some services have none

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Leave the terminal in order, also after an exception."""
        while self._bars:
            self._close(trainer)

    def print(self, text: str) -> None:
        """Write `text` to stdout, above the bars."""
        if not self._bars or sys.stdout is None:
            print(text)
            return
        from tqdm import tqdm

        tqdm.write(text)

    def say(self, text: str) -> None:
        """Show `text` in the place of the metrics until the next drawing: what the training waits for."""
        if self._bars:
            with self._while_it_works():
                self._bars[-1].draw({"step": text})

    def _open(self, description: str, total: int | float | None = None, leave: bool = True) -> None:
        if self._shown:
            known = None if total is None or math.isinf(total) else int(total)
            with self._while_it_works():
                self._bars.append(self._make(description, known, leave and self._leave))

    def _make(self, description: str, total: int | None, leave: bool) -> Any:
        return _Bar(description, total, self._seconds, leave)

    @contextmanager
    def _while_it_works(self) -> Iterator[None]:
        """Show nothing from now on if stderr has gone: no training ends because its terminal was closed."""
        try:
            yield
        except (OSError, ValueError):  # the pipe is broken, or the file is closed
            self._shown = False
            self._bars.clear()

    def _advance(self, trainer: Trainer) -> None:
        if self._bars:
            bar = self._bars[-1]
            bar.done += 1
            if time.monotonic() >= bar.due:
                with self._while_it_works():
                    bar.draw(trainer.progress_bar_metrics)

    def _close(self, trainer: Trainer) -> None:
        if self._bars:
            with self._while_it_works():
                self._bars.pop().close(trainer.progress_bar_metrics)

    # ---------------------------------------------------------------- when

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Say in one line what runs where."""
        self._first_epoch, self._began = trainer.current_epoch, time.monotonic()
        if self._shown:
            with self._while_it_works():
                print(_introduction(trainer, module), file=sys.stderr, flush=True)

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Open the bar of the epoch."""
        last = f"/{trainer.max_epochs}" if trainer.max_epochs is not None and trainer.max_epochs > 0 else ""
        self._open(f"Epoch {trainer.current_epoch + 1}{last}{self._left(trainer)}", trainer.num_training_batches)

    def _left(self, trainer: Trainer) -> str:
        """Return the time left for this epoch and those after it, by the epochs before; empty for the last one."""
        done = trainer.current_epoch - self._first_epoch
        left = (trainer.max_epochs or 0) - trainer.current_epoch
        if not self._began or done < 1 or left < 2:
            return ""
        seconds = (time.monotonic() - self._began) / done * left
        return f" ({timedelta(seconds=round(seconds))} left in all)"

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch."""
        self._advance(trainer)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Draw the epoch for the last time."""
        self._close(trainer)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Open the bar of validation, which disappears if it is part of training."""
        title = "Sanity check" if trainer.sanity_checking else "Validation"
        sizes = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._open(title, sum(sizes) if sizes else None, leave=not self._fitting)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch."""
        self._advance(trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Draw validation for the last time."""
        self._close(trainer)

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Open the bar of testing."""
        self._open("Testing", sum(trainer.num_test_batches) or None)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch."""
        self._advance(trainer)

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Draw testing for the last time."""
        self._close(trainer)

    def on_predict_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Open the bar of prediction."""
        self._open("Predicting", sum(trainer.num_predict_batches) or None)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch."""
        self._advance(trainer)

    def on_predict_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Draw prediction for the last time."""
        self._close(trainer)


def _introduction(trainer: Trainer, module: LightningModule) -> str:
    backend = trainer.backend
    parameters = [p for p in module.parameters() if not is_lazy(p)]
    count, trained = (
        sum(map(backend.elements_of, p)) for p in (parameters, [p for p in parameters if p.requires_grad])
    )
    ranks = f"{trainer.world_size} process{'es' if trainer.world_size > 1 else ''}"
    frozen = f" ({trained:,} trainable)" if trained < count else ""
    return f"xtrain: {backend.name}, {backend.precision.name}, {ranks}, {count:,} parameters{frozen}"


class _Bar:
    """One bar of tqdm: drawn in place in a terminal or a notebook, line by line elsewhere."""

    def __init__(self, description: str, total: int | None, seconds: float | None, leave: bool) -> None:
        # In a notebook a widget, where one can be shown.
        tqdm: Any = import_module("tqdm.auto" if "ipykernel" in sys.modules else "tqdm").tqdm
        self._moves = sys.stderr.isatty() or "ipykernel" in sys.modules
        self._leave = leave
        usual = _SECONDS_IN_A_TERMINAL if self._moves else _SECONDS_IN_A_LOG_FILE
        self._seconds = usual if seconds is None else seconds
        file = sys.stderr if self._moves else io.StringIO()  # tqdm formats the lines, but does not write them
        narrow = self._moves and get_terminal_size().columns < _NARROW
        self._tqdm = tqdm(
            desc=description,
            total=total,
            file=file,
            leave=leave,
            dynamic_ncols=self._moves,
            bar_format=_SHORT if narrow and total is not None else None,
        )
        self.done = 0
        self.due = time.monotonic() + self._seconds

    def draw(self, metrics: Mapping[str, Any]) -> None:
        self.due = time.monotonic() + self._seconds
        self._tqdm.n = self.done
        self._tqdm.set_postfix(metrics, refresh=False)
        if self._moves:
            self._tqdm.refresh()
        else:
            print(self._tqdm, file=sys.stderr, flush=True)

    def close(self, metrics: Mapping[str, float]) -> None:
        if self._moves or self._leave:
            self.draw(metrics)
        self._tqdm.close()
