"""Several processes of an interactive session, which has no script: accelerate forks it, xtrain joins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from small import net, rows, square

ROOT = Path(__file__).resolve().parent.parent.parent

CELLS = """
import torch
from small import Small, loader
from xtrain import Trainer

def train():
    module, trainer = Small(), Trainer(max_epochs=2, devices=2, enable_progress_bar=False)
    trainer.fit(module, loader())
    print("RANK", trainer.global_rank, trainer.world_size, module.net.weight.tolist()[0], flush=True)

try:
    train()
except Exception as error:
    print("SAID", error)

from accelerate import notebook_launcher
notebook_launcher(train, num_processes=2)

"""


def test_a_session_says_how_to_fork_and_its_ranks_train_as_one_process():
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "ACCELERATE_USE_CPU": "true"}
    environment |= {"USE_TORCH_XLA": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-i"], input=CELLS, env=environment, capture_output=True, text=True, timeout=250
    )
    said = done.stdout
    assert "Received: an interactive session, which has no script." in said, said + done.stderr
    assert "from accelerate import notebook_launcher; notebook_launcher(train, num_processes=2)" in said
    lines = sorted(line for line in said.splitlines() if line.startswith("RANK "))
    assert [line.split()[1:3] for line in lines] == [["0", "2"], ["1", "2"]], said + done.stderr

    layer = net()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for batch in 2 * [rows()[:4], rows()[4:]]:
        optimizer.zero_grad()
        square(layer, batch).backward()
        optimizer.step()
    for line in lines:
        own = torch.tensor(json.loads(line[line.index("[") :]))
        torch.testing.assert_close(own, layer.weight[0].detach(), rtol=1e-6, atol=1e-6)
