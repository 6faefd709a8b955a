"""A training in the kernel of a notebook: its bar is a widget, and one for all epochs."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent.parent
CELL = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from small import Small, loader
from xtrain import Trainer

class Logged(Small):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.log("loss", 0.5, prog_bar=True)

    def validation_step(self, batch, batch_idx):
        self.log("val", 2.5, prog_bar=True)

Trainer(backend="cpu", max_epochs=3, log_every_n_steps=1).fit(Logged(), loader(), loader(2))
"""


def test_the_bar_is_a_widget(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    NotebookClient(notebook, timeout=250, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    widgets = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"].values()
    bars = [w["state"] for w in widgets if w["model_name"] == "FloatProgressModel"]
    texts = [w["state"]["value"] for w in widgets if w["model_name"] == "HTMLModel"]
    assert [(bar["value"], bar["max"]) for bar in bars if bar["bar_style"] == "success"] == [(12.0, 12.0)]
    assert "Epoch 3/3: 100%" in [text.replace("\u2007", " ") for text in texts]
    assert any("12/12" in text and "loss=0.5" in text and "val=2.5" in text for text in texts)
    said = "".join(o["text"] for o in notebook.cells[0].outputs if o.get("name") == "stderr")
    assert said.startswith("xtrain: backend=cpu (given); ")
    assert "Epoch" not in said
