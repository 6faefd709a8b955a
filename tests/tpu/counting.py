"""What torch_xla counts, and a callback that reads it step by step."""

from __future__ import annotations

from typing import Any

from xtrain import Callback


def counters() -> dict[str, int]:
    """Return what happened so far: compiles, executions, transfers either way, ``.item()`` calls."""
    import torch_xla.core.xla_model as xm
    import torch_xla.debug.metrics as met

    xm.wait_device_ops()  # executions are only counted when they end

    def metric(name: str) -> int:
        data = met.metric_data(name)
        return data[0] if data else 0

    return {
        "compiles": met.counter_value("UncachedCompile") or 0,
        "executions": metric("ExecuteTime") + metric("ExecuteReplicatedTime"),
        "from_device": metric("TransferFromDeviceTime"),
        "to_device": metric("TransferToDeviceTime"),
        "items": met.counter_value("aten::_local_scalar_dense") or 0,
    }


class Count(Callback):
    """Notes what each training batch cost, its own hooks, logging and progress bar included.

    A row goes from one ``on_train_batch_start`` to the next, so it has the reads of a log point too.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, int]] = []
        self._before: dict[str, int] | None = None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self._turn()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self._turn()

    def _turn(self) -> None:
        now = counters()
        if self._before is not None:
            self.rows.append({name: now[name] - self._before[name] for name in now})
        self._before = now

    def __getitem__(self, name: str) -> list[int]:
        return [row[name] for row in self.rows]
