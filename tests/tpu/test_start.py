"""Before the first step: what is refused, batches that travel while the device computes, kept graphs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from fresh import fresh, fresh_process
from torch import nn

from xtrain import Callback, LightningModule, Trainer

HIDDEN = "import sys; sys.modules['torch_xla'] = None; "  # as if it were not installed
TRAIN = "import xtrain; xtrain.Trainer('tpu', max_epochs=1).fit(xtrain.LightningModule(), [])"


class Heavy(LightningModule):
    """A step that keeps the device busy for far longer than a small batch travels."""

    def __init__(self, width: int = 1200) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Linear(width, width)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def training_step(self, x: torch.Tensor, batch_idx: int) -> None:
        opt = self.optimizers()
        opt.zero_grad()
        for _ in range(3):
            x = self.net(x).tanh()
        self.manual_backward(x.pow(2).mean())
        opt.step()


# ---------------------------------------------------------------- refused


def message(code: str, **variables: str | None) -> str:
    """Run `code`, which must fail, and return what it wrote."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
    wanted = {name: value for name, value in environment.items() if value is not None}
    done = subprocess.run([sys.executable, "-c", code], env=wanted, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    return done.stderr


def test_without_torch_xla_the_error_has_the_command():
    text = message(HIDDEN + TRAIN)
    assert "BackendUnavailableError: Backend 'tpu' cannot run here: torch_xla is not installed" in text
    assert "pip install 'xtrain-torch[tpu]'" in text


def test_versions_that_do_not_load_together_are_refused_with_the_pair_that_does(tmp_path):
    about = tmp_path / "torch_xla-2.1.0.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text("Metadata-Version: 2.1\nName: torch_xla\nVersion: 2.1.0\n")
    text = message(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); " + TRAIN)
    ours = torch.__version__.split("+")[0]
    assert f"torch {ours} and torch_xla 2.1.0 do not load together" in text
    assert "pip install 'torch==2.1.0' 'torch_xla==2.1.0'" in text


def test_without_a_tpu_the_error_explains_the_rehearsal():
    text = message(TRAIN, PJRT_DEVICE=None)
    assert "cannot run here: there is no TPU; to rehearse on the CPU" in text
    assert "PJRT_DEVICE=CPU python script.py" in text


def late_start() -> None:
    torch.ones(1, requires_grad=True).sum().backward()
    Trainer("tpu", max_epochs=1).fit(Heavy(4), [torch.ones(2, 4)])


def test_a_backward_before_the_runtime_is_explained():
    done = fresh_process(late_start)
    assert "Received: a loss.backward() on the CPU before the first run on this backend" in done.stderr
    assert "import torch_xla; torch_xla.device()" in done.stderr


# ---------------------------------------------------------------- batches travel while the device computes


class Executions(Callback):
    """Notes how many graphs have ended when a batch is on the device, and its step about to begin."""

    def __init__(self) -> None:
        self.ended: list[int] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        import torch_xla.debug.metrics as met

        names = ("ExecuteTime", "ExecuteReplicatedTime")
        self.ended.append(sum((met.metric_data(name) or [0])[0] for name in names))


def travel(mesh: dict[str, int] | None) -> list[int]:
    executions, hooks = Executions(), []

    class Net(Heavy):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            hooks.append("before")
            return batch

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            hooks.append(batch.device.type)
            return batch

    options = {"mesh": mesh} if mesh else None
    trainer = Trainer("tpu", backend_options=options, max_epochs=1, callbacks=executions, enable_progress_bar=False)
    trainer.fit(Net(), list(torch.randn(8, 512, 1200)))
    assert hooks == ["before", "xla"] * 8
    return executions.ended


def test_the_next_batch_is_on_the_device_before_the_current_step_has_ended():
    for mesh, devices in ((None, "1"), ({"data": 2}, "2")):
        ended = fresh(travel, mesh, CPU_NUM_DEVICES=devices)
        # i steps were launched. If a batch waited for them, or for its turn on the device, all would have ended.
        still_running = [i for i, count in enumerate(ended) if i > 2 and count - ended[0] < i]
        assert still_running, ended


# ---------------------------------------------------------------- kept graphs


def keep(folder: str | None, again: bool = False) -> dict[str, Any]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("xtrain")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    for place in (folder, f"{folder}-2")[: 1 + again]:
        options = {"compile_cache": place} if place else None
        trainer = Trainer("tpu", backend_options=options, max_epochs=1, enable_progress_bar=False)
        trainer.fit(Heavy(4), [torch.ones(2, 4)] * 3)
    return {"lines": lines, "counts": trainer.backend._runtime.cache_counts()}


def test_graphs_are_kept_where_they_shall_be_and_what_became_of_them_is_reported(tmp_path):
    first = fresh(keep, str(tmp_path / "cache"), PJRT_LOCAL_PROCESS_RANK="3")
    entries = list((tmp_path / "cache" / "rank3").iterdir())
    assert len(entries) == first["counts"]["Miss"] > 0
    assert first["lines"] == [f"compile cache: {first['counts']}"]
    second = fresh(keep, str(tmp_path / "cache"), PJRT_LOCAL_PROCESS_RANK="3")
    # This runtime finds its entries and cannot read them; one that can would count hits.
    found = second["counts"]["Hit"] + second["counts"]["DeserializeFailure"]
    assert found == len(entries)
    assert second["lines"] == [f"compile cache: {second['counts']}"]


def test_no_graph_is_kept_in_a_rehearsal_unless_asked_for(tmp_path):
    found = fresh(keep, None, HOME=str(tmp_path))
    assert found == {"lines": [], "counts": {"Hit": 0, "Miss": 0, "DeserializeFailure": 0}}
    assert list(Path(tmp_path).iterdir()) == []


def test_a_folder_that_comes_too_late_is_reported(tmp_path):
    found = fresh(keep, str(tmp_path / "cache"), True)
    assert len(found["lines"]) == 2
    assert "No graph is kept in" in found["lines"][1]
    assert "cache-2" in found["lines"][1]
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
