"""What ``self.log`` does: keep every value where it is, and read all of them at once, rarely.

A logged tensor is only remembered (as a number, where reading it waits for nothing). At a log point
(every ``log_every_n_steps`` training steps, and at the end of an epoch) one call of the backend's
``read_scalars`` brings everything that waits to the host: values for the loggers and the progress bar,
values that an epoch averages, and the checks of the loop. Epoch averages are accumulated on the host,
so nothing is computed on the device and the memory of an epoch stays bounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from xtrain.collectives import Collectives
from xtrain.errors import ConfigurationError, explain
from xtrain.metrics.checks import (
    Settings,
    as_number,
    check_value,
    check_weight,
    refuse_change,
    refuse_twin,
)
from xtrain.metrics.logs import Logs
from xtrain.metrics.metric import INNER_HOOKS, Metric, TensorView, is_torchmetric, new_metric, snapshot
from xtrain.metrics.ranks import combine
from xtrain.metrics.stage import Stage, StageName, agree_on_epoch, reduce_steps, step_key, values_of_epoch
from xtrain.tensors import tensors_in

if TYPE_CHECKING:
    from xtrain.loggers.base import Logger

_READ_EVERY = 1000  # steps between reads that bound memory when there are no log points
_NO_CHECKS: dict[str, float] = {}


class MetricLog(Logs):
    """All metrics of a Trainer.

    The loop says where it is (`stage`, `hook`, `set_batch`), modules and callbacks hand in values
    (`log`), and the loop says when values may be read (`flush_step`, `reduce_epoch`, `send_epoch`).

    Args:
        read_scalars: brings 0-dim tensors to the host, as `Backend.read_scalars` does.
        ranks: the processes of the run, over which ``sync_dist`` reduces.
        log_every_n_steps: steps between log points; 0 sends epoch values only.
        asynchronous: reading a value would wait for the device; if not, each is read when it is logged.

    Attributes:
        loggers: where values are sent.
        checks: 0-dim tensors that the loop wants to see as floats at the next log point.
        callback_metrics: the latest value of every metric by name, also as ``name_step`` and ``name_epoch``.
        logged_metrics: the latest values sent to the loggers.
        at_log_point: whether the step that ended last was one.
        progress_bar_metrics: the latest values with ``prog_bar=True`` that were already read.

    Raises:
        ConfigurationError: if `log_every_n_steps` is not an int of at least 0.
    """

    def __init__(
        self,
        read_scalars: Callable[[Sequence[Tensor]], list[float]],
        ranks: Collectives,
        log_every_n_steps: int = 50,
        asynchronous: bool = True,
    ) -> None:
        if isinstance(log_every_n_steps, bool) or not isinstance(log_every_n_steps, int) or log_every_n_steps < 0:
            received = f"log_every_n_steps={log_every_n_steps!r}"
            raise ConfigurationError(explain("an int of at least 0", received, "Trainer(log_every_n_steps=50)"))
        self._read_scalars, self._ranks, self._asynchronous = read_scalars, ranks, asynchronous
        self._every = log_every_n_steps or _READ_EVERY
        self._sends_steps = log_every_n_steps > 0
        self.loggers: Sequence[Logger] = ()
        self.checks: dict[str, Tensor] = {}
        self.at_log_point = False
        self._checked: dict[str, float] = {}  # those that were read with something else
        self.progress_bar_metrics: dict[str, float] = {}
        self._callback: dict[str, Metric | float] = {}
        self._logged: dict[str, Metric | float] = {}
        self._unreduced: dict[str, Metric] = {}  # of several ranks, what was logged and never reduced over them
        self.callback_metrics: MutableMapping[str, Tensor] = TensorView(self._callback, self._unreduced)
        self.logged_metrics: MutableMapping[str, Tensor] = TensorView(self._logged)
        self._evaluated: Counter[str] = Counter()  # steps of each kind of evaluation, the x-axis of their rows
        self.by_loader: list[tuple[int | None, str, float]] = []  # of the epoch that was sent last
        self.restored: dict[Any, dict[str, Any]] = {}  # values of an earlier run, by hook, loader and name
        self._stage = Stage("idle")
        self._cut: list[Stage] = []  # those that an error has ended

    # ---------------------------------------------------------------- where the loop is

    @contextmanager
    def stage(self, name: StageName) -> Iterator[None]:
        """Collect apart what is logged inside. Stages nest: validation runs inside training.

        What stage ``"sanity"`` collected can be seen inside it and is forgotten at its end.
        """
        outer, self._stage = self._stage, Stage(name)
        views: tuple[dict[str, Any], ...] = (self._callback, self._logged, self.progress_bar_metrics)
        before = [dict(view) for view in views]
        try:
            yield
        except BaseException:
            self._cut.append(self._stage)
            raise
        finally:
            self._stage = outer
            for view, kept in zip(views, before, strict=True) if name == "sanity" else ():
                view.clear()
                view.update(kept)

    def hook(self, name: str) -> None:
        """Say which hook runs from now on; it decides what `log` does by default."""
        if name in INNER_HOOKS:  # they run in the middle of a step, and log as that step does
            return
        stage = self._stage
        stage.hook = name
        stage.scope = stage.scopes[name, stage.dataloader]

    def set_batch(self, batch: Any, dataloader_idx: int | None = None) -> None:
        """Say which batch is worked on; `dataloader_idx` is None unless there are several loaders."""
        stage = self._stage
        stage.batch = batch
        stage.batch_size = None
        if stage.dataloader != dataloader_idx:
            stage.dataloader = dataloader_idx
            self.hook(stage.hook)

    # ---------------------------------------------------------------- values come in

    def _record(self, values: Mapping[str, Any], settings: Settings, batch_size: int | None) -> None:
        for name, value in values.items():
            metric = self._stage.scope.get(name)
            if metric is None or metric.settings != settings:
                metric = self._register(name, value, settings, metric)
            if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
                value = snapshot(value) if self._asynchronous else float(value.item())
            elif type(value) is not float:
                if is_torchmetric(value):
                    metric.take_source(value, self._ranks)
                    continue
                value = as_number(name, value)
            metric.latest, metric.fresh = value, True
            if metric.on_epoch:
                metric.waiting.append(value)
                metric.waiting_weights.append(self._weight() if batch_size is None else check_weight(batch_size))

    def _weight(self) -> int:
        stage = self._stage
        if stage.batch_size is None:
            stage.batch_size = next((t.size(0) for t in tensors_in(stage.batch) if t.dim() and t.size(0)), 1)
        return stage.batch_size

    def _register(self, name: str, value: Any, settings: Settings, known: Metric | None) -> Metric:
        stage = self._stage
        if known is not None:
            refuse_change(name, known.settings, settings)
        if not is_torchmetric(value):
            check_value(name, value)
        metric = new_metric(name, stage.name, stage.hook, stage.dataloader, settings)
        for (hook, loader), scope in stage.scopes.items():
            if hook == stage.hook and any(other.name == metric.name for other in scope.values()):
                refuse_twin(name, loader, stage.dataloader)
        stage.scope[name] = metric.filled(self.restored.pop((stage.hook, stage.dataloader, name), {}))
        metric.shared = metric.sync and self._ranks.world_size > 1
        shown = self._unreduced if metric.shared else self._callback
        if metric.shown_early and not (metric.on_step and stage.evaluates):  # nobody is to watch single batches of it
            shown[metric.name] = shown[metric.step_name] = metric
        return metric

    # ---------------------------------------------------------------- values go out

    def flush_step(self, step: int, epoch: int) -> dict[str, float]:
        """End a step. Every ``log_every_n_steps`` calls this is a log point and does what `flush` does.

        Returns:
            The `checks` as floats by name at a log point, else an empty dict.
        """
        stage = self._stage
        stage.steps += 1
        if stage.evaluates and self._sends_steps:
            stage.keep_steps(self._evaluated[stage.name])
            self._evaluated[stage.name] += 1
        self.at_log_point = stage.steps % self._every == 0
        return self.flush(step, epoch) if self.at_log_point else _NO_CHECKS

    def flush(self, step: int, epoch: int) -> dict[str, float]:
        """Read what waits, and send the step values; the loop calls it when training ends, too.

        Args:
            step: the value of the loggers' x-axis.
            epoch: sent along as ``epoch``.

        Returns:
            The `checks` as floats by name.
        """
        self._read_with_checks()
        checks, self._checked = self._checked, {}
        self._send(self._stage.row, step, epoch)
        self._stage.row = {}
        self._send_kept(epoch)
        return checks

    def send_cut(self, step: int, epoch: int) -> None:
        """After an error, send the step values that did not come to their log point, as far as nothing is waited for.

        Of several ranks those that are shared are left out, and those that a device still computes: it may wait for
        a rank that does not come.
        """
        for stage in self._cut:
            self._stage = stage
            stage.keep_steps(self._evaluated[stage.name] if stage.evaluates else step)
            if self._ranks.world_size > 1:
                for _, row in stage.kept:
                    for metric in [metric for metric, value in row.items() if isinstance(value, Tensor)]:
                        del row[metric]
            self._send(stage.row, step, epoch)
            self._send_kept(epoch)
        self._cut = []

    def _send_kept(self, epoch: int) -> None:
        """Send the step values of evaluation, a row for each step."""
        kept, self._stage.kept = self._stage.kept, []
        values = [value for _, row in kept for value in row.values()]
        waiting = [value.reshape(()) for value in values if isinstance(value, Tensor)]
        read = iter(self._read_scalars(waiting) if waiting else ())
        for step, row in kept:
            floats = {m: next(read) if isinstance(value, Tensor) else value for m, value in row.items()}
            self.progress_bar_metrics.update({m.step_name: value for m, value in floats.items() if m.prog_bar})
            self._send({m.step_name: value for m, value in floats.items() if m.logger}, step, epoch)

    def reduce_epoch(self) -> None:
        """Reduce what was logged since the epoch began, for `callback_metrics`; a second call adds what came since."""
        self.set_batch(None)
        stage, metrics = self._stage, self._stage.metrics()
        agreed = agree_on_epoch(stage, self._ranks)
        for metric in sorted(metrics, key=attrgetter("key")):  # torchmetrics talks to the other ranks, too
            metric.compute_source()
        if any(metric.waiting or metric.fresh for metric in metrics):
            self._read_with_checks()  # which wait as well: one transfer for all
        reduced = [metric for metric in metrics if metric.read and metric.result is None]
        local = values_of_epoch(stage, reduced)
        whole = combine(agreed, local, self._ranks)
        self._callback.update({key: value for key, value in whole.items() if key not in local})
        self._take_steps({m: whole[step_key(m)] for m in stage.late})
        stage.late.clear()
        for metric in reduced:
            metric.result = whole[metric.key] if metric.shared else metric.reduce()
            self._show(metric, metric.epoch_name, metric.result)
            if metric.prog_bar:
                self.progress_bar_metrics[metric.epoch_name] = metric.result

    def _show(self, metric: Metric, also: str, value: float) -> None:
        for name in (metric.name, also):
            self._callback[name] = value
            self._unreduced.pop(name, None)

    def send_epoch(self, step: int, epoch: int) -> dict[str, float]:
        """Send the values of the epoch, also those logged in its last hooks, and forget them.

        Args:
            step: the value of the loggers' x-axis.
            epoch: sent along as ``epoch``.

        Returns:
            The epoch values by name, those of several evaluation loaders with their suffix.
        """
        self.reduce_epoch()
        self._send_kept(epoch)
        stage = self._stage
        ended = [(metric, metric.result) for metric in stage.metrics() if metric.result is not None]
        self._send(stage.row | {m.epoch_name: value for m, value in ended if m.logger}, step, epoch)
        self.by_loader = [(m.dataloader, m.epoch_name, value) for m, value in ended]
        self._forget_epoch()
        return {m.epoch_name: value for m, value in ended}

    def _forget_epoch(self) -> None:
        stage = self._stage
        stage.row = {}
        for source in {id(metric.source): metric.source for metric in stage.metrics()}.values():
            if source is not None:
                source.reset()
        for scope in stage.scopes.values():
            for name, metric in list(scope.items()):
                metric.end_epoch()
                if not metric.fresh:
                    del scope[name]
        if stage.name != "sanity":
            for logger in self.loggers:
                logger.save()

    def _read_with_checks(self) -> None:
        names = list(self.checks)
        self._checked |= dict(zip(names, self._read(list(self.checks.values())), strict=True))
        self.checks.clear()

    def _read(self, extra: list[Tensor]) -> list[float]:
        """Bring everything that waits to the host, and `extra`, which is returned: one transfer for all."""
        metrics = [(metric, metric.unread()) for metric in self._stage.metrics() if metric.fresh or metric.waiting]
        tensors = [value for _, values in metrics for value in values if isinstance(value, Tensor)]
        tensors += extra
        floats = iter(self._read_scalars([t.reshape(()) if t.dim() else t for t in tensors]) if tensors else ())
        stepped: list[tuple[Metric, float]] = []
        for metric, values in metrics:
            numbers = [next(floats) if isinstance(value, Tensor) else value for value in values]
            if metric.on_step and metric.fresh:
                stepped.append((metric, numbers[-1]))
            metric.receive(numbers)
        self._show_steps([metric for metric, _ in stepped], [value for _, value in stepped])
        return list(floats)

    def _show_steps(self, metrics: list[Metric], local: list[float]) -> None:
        pairs = dict(zip(metrics, local, strict=True))
        if any(metric.shared for metric in metrics):
            shared = {m: value for m, value in pairs.items() if m.shared}
            if self._stage.evaluates:  # ranks may have unequally many batches: what is shared waits for the end
                self._stage.late |= shared
                pairs = {m: value for m, value in pairs.items() if not m.shared}
            else:
                pairs |= reduce_steps(shared, self._ranks)
        self._take_steps(pairs)

    def _take_steps(self, pairs: Mapping[Metric, float]) -> None:
        for metric, value in pairs.items():
            if metric.shared and not self._stage.evaluates:
                self._show(metric, metric.step_name, value)
        self.progress_bar_metrics.update({m.step_name: value for m, value in pairs.items() if m.prog_bar})
        if self._sends_steps:
            self._stage.row |= {m.step_name: value for m, value in pairs.items() if m.logger}

    def reduce_now(self, name: str) -> None:
        """Reduce the newest step value of `name` over the ranks, which must all come here, for `callback_metrics`."""
        for metric in self._stage.metrics():
            if metric.shared and metric.fresh and metric.latest is not None and name in (metric.name, metric.step_name):
                latest = metric.latest
                value = self._read_scalars([latest.reshape(())])[0] if isinstance(latest, Tensor) else latest
                self._show(metric, metric.step_name, reduce_steps({metric: value}, self._ranks)[metric])

    def _send(self, row: Mapping[str, float], step: int, epoch: int) -> None:
        if not row or self._stage.name == "sanity":
            return
        self._logged.update(row)
        for logger in self.loggers:
            logger.log_metrics({"epoch": epoch, **row}, step)
