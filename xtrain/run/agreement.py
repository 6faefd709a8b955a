"""What the ranks of a run agree on between their steps. A run of one process has nothing to agree on."""

from __future__ import annotations

from xtrain.loggers.base import FileLogger
from xtrain.run.state import Run


def introduce(run: Run) -> None:
    """Let every collective say where this run is, and whether this rank wants the training to end."""
    ranks = run.backend.collectives
    if ranks.world_size > 1:
        ranks.position, ranks.asks = run.position, lambda: run.trainer.should_stop
        _share_versions(run)


def _share_versions(run: Run) -> None:
    """Give the loggers of every rank the folder that rank 0 has claimed: another run's is none of its business."""
    ranks, loggers = run.backend.collectives, [each for each in run.trainer.loggers if isinstance(each, FileLogger)]
    if loggers:
        own = [logger.version for logger in loggers] if ranks.rank == 0 else []
        for logger, version in zip(loggers, ranks.gather_json(own, "number the run")[0], strict=True):
            logger.adopt_version(version)


def stops(run: Run) -> bool:
    """Return whether ``trainer.should_stop`` ends the training here: on several ranks, once all have heard of it.

    Every header carries the wish of its rank. The averaging of gradients has one, so a wish from before it is heard
    in the same step, a later one in the next.
    """
    ranks = run.backend.collectives
    if ranks.world_size == 1:
        return run.trainer.should_stop
    if ranks.asked:
        run.trainer.should_stop = True
    return ranks.asked


def end_epoch(run: Run) -> None:
    """Bring the ranks together at the end of an epoch; see whether they still hold the same.

    Raises:
        ProtocolError: on every rank, if they did not come here alike, or hold different parameters or buffers.
    """
    if run.backend.collectives.world_size > 1:
        run.backend.meet("end the epoch")
        if run.trainer.check_replicas == "epoch":
            run.backend.check_replicas(run.module)


def meet(run: Run, call: str) -> None:
    """Bring the ranks together between two steps, if there are several."""
    if run.backend.collectives.world_size > 1:
        run.backend.meet(call)
