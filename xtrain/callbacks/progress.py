"""A progress bar that costs nothing per step: it looks at the clock, and draws when it is time."""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any

from xtrain.callbacks.base import Callback
from xtrain.checks import check_count

if TYPE_CHECKING:
    from xtrain.module import LightningModule
    from xtrain.trainer import Trainer

_SECONDS_IN_A_TERMINAL = 0.1
_SECONDS_IN_A_LOG_FILE = 60.0
_FULL = 62  # columns of a bar beside its title and its metrics
_SHORT = "{desc} {n_fmt}/{total_fmt}{postfix} [{remaining}]"  # where there are fewer, the bar gives way to the metrics
_KINDS = {"Epoch": "train", "Sanity": "sanity", "Validation": "validation", "Testing": "test", "Predicting": "predict"}
_LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class ProgressBar(Callback):
    """Shows batches over all epochs, the time left for the whole fit and the metrics logged with ``prog_bar=True``.

    On rank 0, on stderr. Metrics are those that a log point has read already, so the bar never waits for the device.
    Where stderr is a file or a pipe there is no bar, but a line per epoch, and one a minute in long ones.

    Args:
        refresh_rate: batches between two looks at the clock; 0 shows nothing.
        process_position: rows to leave free above the bar, for other programs in this terminal.
        leave: keep a line for each finished epoch above the bar.
        refresh_seconds: time between two drawings; default: 0.1 in a terminal, else 60.

    Raises:
        ConfigurationError: for a number below 0.

    Example:
        >>> trainer = Trainer(callbacks=[ProgressBar(refresh_rate=10, leave=True)])
    """

    after_module = True  # what the module logs at the end of an epoch is on the bar

    def __init__(
        self,
        refresh_rate: int = 1,
        process_position: int = 0,
        leave: bool = False,
        *,
        refresh_seconds: float | None = None,
    ) -> None:
        self._rate: int = check_count("refresh_rate", refresh_rate, 0, type(self).__name__)
        self._position: int = check_count("process_position", process_position, 0, type(self).__name__)
        self._seconds, self._leave = refresh_seconds, leave
        self._fitting, self._shown, self._enabled = False, False, True
        self._bars: list[Any] = []  # the last one is drawn: validation runs inside of an epoch
        self._waited: set[str] = set()  # titles whose first step has been waited for
        self._wanted: dict[str, Any] = {}  # what the next bar of tqdm is made with
        self._trainer: Trainer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_trainer": None}

    # ---------------------------------------------------------------- what users change

    def get_metrics(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Return what is shown beside the bar, by name; override it to add something or to take it away."""
        return dict(trainer.progress_bar_metrics)

    def init_train_tqdm(self) -> Any:
        """Return the bar of tqdm for training; override it to change how it looks, also those of the other stages.

        Example:
            >>> class Quiet(ProgressBar):
            ...     def init_validation_tqdm(self):
            ...         return tqdm(disable=True)
        """
        tqdm: Any = import_module("tqdm.auto" if "ipykernel" in sys.modules else "tqdm").tqdm
        return tqdm(**self._wanted)

    init_sanity_tqdm = init_validation_tqdm = init_test_tqdm = init_predict_tqdm = init_train_tqdm

    trainer = property(lambda self: self._trainer, doc="The Trainer of the current or last run, None before the first.")
    refresh_rate = property(lambda self: self._rate, doc="Batches between two looks at the clock.")
    is_enabled = property(lambda self: self._enabled and self._rate > 0, doc="Whether it shows anything.")
    is_disabled = property(lambda self: not self.is_enabled, doc="Whether it shows nothing.")

    def enable(self) -> None:
        """Show something from the next run on, after `disable`."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing from now on."""
        self._enabled = self._shown = False

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
                self._bars[-1].draw(text)

    # ---------------------------------------------------------------- how

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Find out whether this process shows anything."""
        self._trainer, self._fitting, self._waited = trainer, stage == "fit", set()
        # pythonw and some services have no stderr
        self._shown = self._enabled and trainer.is_global_zero and self._rate > 0 and sys.stderr is not None

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Leave the terminal in order, also after an exception."""
        while self._bars:
            self._close(trainer, module)

    def _open(self, trainer: Trainer, title: str, total: float, leave: bool = True, done: int = 0) -> None:
        """Show another bar, and what its first step waits for."""
        if not self._shown:
            return
        with self._while_it_works():
            self._bars.append(self._make(title, _known(total), leave, done))
            self._bars[-1].done = done
        kind = title.split()[0]
        if trainer.backend.first_step and kind not in self._waited:
            self.say(trainer.backend.first_step)
        self._waited.add(kind)

    def _make(self, title: str, total: int | None, leave: bool, done: int) -> Any:
        notebook = "ipykernel" in sys.modules  # a widget, where one can be shown
        terminal = sys.stderr.isatty() and not notebook
        moves = terminal or notebook
        self._wanted = {
            "desc": title,
            "total": total,
            "initial": done,
            "file": sys.stderr if moves else io.StringIO(),  # tqdm formats the lines, but does not write them
            "leave": leave,
            "position": self._position + len(self._bars) if moves else None,
            "dynamic_ncols": moves,
        }
        bar, self._wanted = getattr(self, f"init_{_KINDS[title.split()[0]]}_tqdm")(), {}
        return _Bar(bar, total, self._seconds, leave, done, terminal, moves)

    @contextmanager
    def _while_it_works(self) -> Iterator[None]:
        """Show nothing from now on if stderr has gone: no training ends because its terminal was closed."""
        try:
            yield
        except (OSError, ValueError):  # the pipe is broken, or the file is closed
            self._shown = False
            self._bars.clear()

    def _advance(self, trainer: Trainer, module: LightningModule) -> None:
        if self._bars:
            bar = self._bars[-1]
            bar.done += 1
            if bar.done % self._rate == 0 and time.monotonic() >= bar.due:
                self._draw(trainer, module)

    def _draw(self, trainer: Trainer, module: LightningModule) -> None:
        metrics = self.get_metrics(trainer, module)
        with self._while_it_works():
            self._bars[-1].draw(metrics)

    def _close(self, trainer: Trainer, module: LightningModule) -> None:
        if self._bars:
            metrics = self.get_metrics(trainer, module)
            with self._while_it_works():
                self._bars.pop().close(metrics)

    # ---------------------------------------------------------------- when

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Open the bar with the first epoch; name the later ones."""
        last = f"/{trainer.max_epochs}" if trainer.max_epochs is not None and trainer.max_epochs > 0 else ""
        title, total = f"Epoch {trainer.current_epoch + 1}{last}", trainer.total_batches
        if self._bars:
            with self._while_it_works():
                self._bars[-1].rename(title, _known(total))
        else:
            self._open(trainer, title, total, done=trainer.progress.batches)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch."""
        self._advance(trainer, module)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Draw the last values of the epoch."""
        if self._bars:
            self._draw(trainer, module)
        if self._bars and self._leave:
            with self._while_it_works():
                self._bars[-1].keep()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Leave the bar as it is."""
        self._close(trainer, module)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Open the bar of validation, which disappears if it is part of training."""
        title = "Sanity check" if trainer.sanity_checking else "Validation"
        sizes = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._open(trainer, title, sum(sizes) or math.inf, leave=not self._fitting)

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
        self._advance(trainer, module)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Draw validation for the last time."""
        self._close(trainer, module)

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Open the bar of testing."""
        self._open(trainer, "Testing", sum(trainer.num_test_batches) or math.inf)

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
        self._advance(trainer, module)

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Draw testing for the last time."""
        self._close(trainer, module)

    def on_predict_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Open the bar of prediction."""
        self._open(trainer, "Predicting", sum(trainer.num_predict_batches) or math.inf)

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
        self._advance(trainer, module)

    def on_predict_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Draw prediction for the last time."""
        self._close(trainer, module)


TQDMProgressBar = ProgressBar
"""Lightning's name of it."""


def _known(total: float) -> int | None:
    return None if math.isinf(total) else int(total)


class _Bar:
    """One bar of tqdm: drawn in place in a terminal or a notebook, line by line elsewhere."""

    def __init__(
        self, bar: Any, total: int | None, seconds: float | None, leave: bool, done: int, terminal: bool, moves: bool
    ) -> None:
        self._tqdm, self._terminal, self._moves = bar, terminal, moves
        bar.total = total if bar.total is None else bar.total
        usual = _SECONDS_IN_A_TERMINAL if self._moves else _SECONDS_IN_A_LOG_FILE
        self._seconds = usual if seconds is None else seconds
        self._leave = leave
        self._drawn: Any = None
        self.done = done
        self.due = time.monotonic() + self._seconds

    def rename(self, title: str, total: int | None) -> None:
        self._tqdm.set_description_str(title, refresh=False)
        self._tqdm.total = total
        if total is not None and hasattr(self._tqdm, "container"):  # the widget has a length of its own
            self._tqdm.container.children[1].max = total

    def draw(self, metrics: Mapping[str, Any] | str) -> None:
        self.due = time.monotonic() + self._seconds
        bar = self._tqdm
        if bar.disable:
            return
        bar.n = self.done
        (bar.set_postfix_str if isinstance(metrics, str) else bar.set_postfix)(metrics, refresh=False)
        if self._moves:
            narrow = get_terminal_size().columns < len(bar.desc) + len(bar.postfix) + _FULL
            bar.bar_format = _SHORT if self._terminal and narrow and bar.total is not None else None
            bar.refresh()
            return
        bar.bar_format = None if bar.total is None else _LINE
        drawn, self._drawn = self._drawn, (bar.desc, self.done, bar.postfix)
        if drawn != self._drawn:
            print(bar, file=sys.stderr, flush=True)

    def keep(self) -> None:
        """Leave a copy of what is drawn above the bar."""
        if self._moves and not self._tqdm.disable:
            self._tqdm.write(str(self._tqdm), file=sys.stderr)

    def close(self, metrics: Mapping[str, Any]) -> None:
        if self._moves or self._leave:
            self.draw(metrics)
        self._tqdm.close()
