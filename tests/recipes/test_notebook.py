"""The notebook of the GAN: it runs from top to bottom, and shows pictures, also where nobody has run it yet."""

from __future__ import annotations

import base64
import os

import nbformat
from nbclient import NotebookClient
from recipes import EXAMPLES, ROOT

PATH = EXAMPLES / "gan.ipynb"


def pictures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [base64.b64decode(o["data"]["image/png"]) for o in outputs if "image/png" in o.get("data", {})]


def test_it_is_kept_with_its_pictures():
    notebook = nbformat.read(PATH, as_version=4)
    assert [cell.cell_type for cell in notebook.cells] == ["markdown", "code", "code"]
    assert len(pictures(notebook)) == 2
    assert PATH.stat().st_size < 100_000
    assert str(ROOT) not in PATH.read_text()


def test_it_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(EXAMPLES)]))
    notebook = nbformat.read(PATH, as_version=4)
    assert "epochs = 40" in notebook.cells[1].source
    notebook.cells[1].source = notebook.cells[1].source.replace("epochs = 40", "epochs = 1")
    for cell in notebook.cells[1:]:
        cell.outputs = []
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [picture[:4] for picture in pictures(notebook)] == [b"\x89PNG"] * 2
    assert (tmp_path / "outputs" / "digits.png").exists()
