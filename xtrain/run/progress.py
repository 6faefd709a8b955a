"""Where the training of a Trainer is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """Where the training of a Trainer is.

    Attributes:
        epoch: the number of epochs that were finished, and so the current one, from 0.
        global_step: training steps in which at least one optimizer stepped.
        batches: training batches over all epochs.
        first_batch: those of the epochs before this one.
        batch_idx: the current batch of the epoch, from 0.
        is_last_batch: whether it is the last of its epoch.
        done: batches of the current epoch whose steps were made.
        ending: 1 while hooks are told the end of a batch, which is not among `done` yet; its steps were made.
        logged_steps: the x-axis of the loggers: training batches, those that automatic optimization accumulates
            counted as one.
    """

    epoch: int = 0
    global_step: int = 0
    batches: int = 0
    first_batch: int = 0
    batch_idx: int = 0
    is_last_batch: bool = False
    done: int = 0
    ending: int = 0
    logged_steps: int = 0

    @property
    def made(self) -> int:
        """Batches of the current epoch whose steps were made: who goes on from here begins with the next one."""
        return self.done + self.ending
