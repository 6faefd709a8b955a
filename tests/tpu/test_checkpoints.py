"""What a checkpoint costs on a TPU, counted by torch_xla: a save, and a run that goes on from one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from counting import Count, counters
from fresh import fresh
from test_graphs import Gan, data

from xtrain import ModelCheckpoint, Trainer

STEPS, EVERY = 12, 4


class Counted(ModelCheckpoint):
    """Counts what each save takes, from the end of a step to the end of the save."""

    def __init__(self, folder: str, **options: Any) -> None:
        super().__init__(folder, every_n_train_steps=EVERY, every_n_epochs=0, save_top_k=-1, **options)
        self.costs: list[dict[str, int]] = []

    def at_safe_point(self, trainer: Any, kind: str) -> None:
        before, known = counters(), len(self.best_k_models)
        super().at_safe_point(trainer, kind)
        self.wait()
        if len(self.best_k_models) > known:
            after = counters()
            self.costs.append({name: after[name] - before[name] for name in after})


class Averaged(Gan):
    """With sums of metrics that wait for the end of the epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.log("mean", batch[0].mean(), on_step=False, on_epoch=True)


def saves_and_a_resume(background: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:

        def fit(steps: int, ckpt_path: Path | None = None) -> tuple[Counted, Count, Averaged]:
            saver, count = Counted(folder, background=background), Count()
            module = Averaged(lambda parameters: torch.optim.Adam(parameters, lr=0.01), lambda step, i: 0.9**step)
            trainer = Trainer("tpu", max_steps=steps, callbacks=[saver, count], enable_progress_bar=False)
            trainer.fit(module, data(STEPS), ckpt_path=ckpt_path)
            return saver, count, module

        saver, whole, module = fit(STEPS)
        # In the same process nothing has to be compiled that was compiled before.
        _, resumed, again = fit(STEPS, next(Path(folder).glob("*step=4.ckpt")))
        pairs = zip(module.parameters(), again.parameters(), strict=True)
        return {
            "saves": saver.costs,
            "whole": whole.rows,
            "resumed": resumed.rows,
            "error": max((a - b).abs().max().item() for a, b in pairs),
        }


def test_one_execution_and_one_transfer_per_save_and_no_compile_after_a_resume() -> None:
    for background in (False, True):
        found = fresh(saves_and_a_resume, background)
        assert len(found["saves"]) == 3
        for cost in found["saves"]:
            assert cost["executions"] <= 1, cost
            assert cost["from_device"] <= 1, cost
            assert cost["items"] == 0, cost
        assert [row["compiles"] for row in found["resumed"]] == [0] * len(found["resumed"])
        assert len(found["resumed"]) == STEPS - 4
        assert found["error"] == 0.0
