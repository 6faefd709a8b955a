"""What users call on a Trainer to learn what a training will come to elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from xtrain.run.state import TrainerState

if TYPE_CHECKING:
    from xtrain.module import LightningModule
    from xtrain.rehearsal.findings import Report


class Rehearsed(TrainerState):
    """The part of a `Trainer` that rehearses."""

    def check(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        datamodule: Any = None,
        *,
        targets: Sequence[str] = (),
        memory: int | None = None,
        steps: int = 4,
        ignore: Sequence[str] = (),
        checks: Sequence[str] = (),
    ) -> Report:
        """Rehearse a training of `model` on the CPU, as ``xtrain check`` does; nothing here changes.

        The checks run in forks of this process, which have the module and the loader as they are (nothing is
        pickled, so classes of a notebook or a function serve, too); each check gets a deep copy of the module. Its
        tensors must be on the CPU, and the system one with ``os.fork``.

        Args:
            model: the module, before its training.
            train_dataloaders: as for `fit`.
            datamodule: as for `fit`.
            targets: backends, precisions and ``"processes"``; default: everything.
            memory: of each device, in bytes.
            steps: training steps of a check.
            ignore: ids of findings to leave out.
            checks: names of checks; default: all.

        Returns:
            The report: `findings`, `skipped`, `figures`, `status`; its text is one screen.

        Raises:
            ConfigurationError: for tensors that are not on the CPU, or a system without forks.

        Example:
            >>> report = Trainer(enable_progress_bar=False).check(module, data, checks=["protocol"])
            >>> report.status, [finding.id for finding in report.findings]
            (0, [])
        """
        from xtrain.rehearsal.rehearse import Settings
        from xtrain.rehearsal.verbs import check_in_memory

        settings = Settings(
            tuple(targets), steps, self.backend.devices, memory, tuple(ignore), tuple(checks)
        )  # fmt: skip
        return check_in_memory(model, datamodule if train_dataloaders is None else train_dataloaders, settings, self)
