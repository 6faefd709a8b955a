"""`log` and `log_dict`: one signature, for modules, callbacks and the collection behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from xtrain.metrics.checks import Settings, refuse_call


class Logs:
    """Whoever may log; a subclass says in `_record` where values go."""

    _record: Callable[[Mapping[str, Any], Settings, int | None], None]

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool = True,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., Any] = "mean",
        sync_dist: bool = False,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
        **unknown: Any,
    ) -> None:
        """Record one value. Neither waits for the device nor gives it work.

        Args:
            name: of the metric. Logged per step and per epoch, it becomes ``name_step`` and ``name_epoch``.
            value: a number, a tensor of one element, or a torchmetrics object.
            prog_bar: show it in the progress bar.
            logger: send it to the loggers.
            on_step: send the newest value at every log point; the default in the hooks of a training step.
            on_epoch: send the reduction over the epoch; the default in all other hooks.
            reduce_fx: ``"mean"`` (weighted by batch size), ``"sum"``, ``"min"``, ``"max"``, or a function of a
                1-dim tensor, all values of the epoch.
            sync_dist: reduce over the ranks too, at log points and epoch ends; every rank must log it. Until
                then `callback_metrics` has what was reduced before.
            add_dataloader_idx: tell several evaluation loaders apart by a suffix of the name.
            batch_size: weight of this value in the mean; default: the first dimension of the batch.
            metric_attribute: taken as in Lightning, not needed.
            rank_zero_only: it is logged on rank 0 only, so it is never reduced over the ranks.
            **unknown: refused, with the option that was meant.

        Raises:
            ConfigurationError: for a value, a hook or settings that cannot be logged.

        Example:
            >>> self.log("loss", self.net(batch).square().mean(), prog_bar=True, on_epoch=True)
        """
        if unknown and not _harmless(unknown):
            refuse_call(value, unknown)
        settings = Settings(
            prog_bar, logger, on_step, on_epoch, reduce_fx, sync_dist, add_dataloader_idx, rank_zero_only
        )
        self._record({name: value}, settings, batch_size)

    def log_dict(
        self,
        dictionary: Mapping[str, Any],
        prog_bar: bool = False,
        logger: bool = True,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., Any] = "mean",
        sync_dist: bool = False,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
        **unknown: Any,
    ) -> None:
        """Record several values by name, with the same options as `log` has.

        Args:
            dictionary: values by name; a ``torchmetrics.MetricCollection`` too.
            prog_bar: as in `log`.
            logger: as in `log`.
            on_step: as in `log`.
            on_epoch: as in `log`.
            reduce_fx: as in `log`.
            sync_dist: as in `log`.
            add_dataloader_idx: as in `log`.
            batch_size: as in `log`.
            metric_attribute: as in `log`.
            rank_zero_only: as in `log`.
            **unknown: as in `log`.

        Raises:
            ConfigurationError: as in `log`, and for what is no dictionary.

        Example:
            >>> self.log_dict({"loss_g": torch.tensor(0.7), "loss_d": torch.tensor(1.4)}, prog_bar=True)
        """
        if (unknown and not _harmless(unknown)) or not hasattr(dictionary, "items"):
            refuse_call(dictionary, unknown)
        settings = Settings(
            prog_bar, logger, on_step, on_epoch, reduce_fx, sync_dist, add_dataloader_idx, rank_zero_only
        )
        self._record(_without_copies(dictionary), settings, batch_size)


def _harmless(options: Mapping[str, Any]) -> bool:
    """Return whether `options` are Lightning's, with values that change nothing."""
    return all(name in ("enable_graph", "sync_dist_group") and not value for name, value in options.items())


def _without_copies(dictionary: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `dictionary`; a ``torchmetrics.MetricCollection`` as one of its metrics, whose states are not copied."""
    if not hasattr(dictionary, "compute_groups"):
        return dictionary
    return dict(dictionary.items(keep_base=False, copy_state=False))  # type: ignore[call-arg]  # it takes these
