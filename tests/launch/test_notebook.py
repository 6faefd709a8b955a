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

# Every rank writes a file of its own: lines of two ranks on one pipe may come torn.
CELLS = """
import json
from pathlib import Path
from small import Small, loader
from xtrain import Trainer

def train():
    module, trainer = Small(), Trainer(max_epochs=2, devices=2, enable_progress_bar=False)
    trainer.fit(module, loader())
    seen = [trainer.global_rank, trainer.world_size, module.net.weight.tolist()[0]]
    Path(f"rank{trainer.global_rank}.json").write_text(json.dumps(seen))

try:
    train()
except Exception as error:
    print("SAID", error)

from accelerate import notebook_launcher
notebook_launcher(train, num_processes=2)

"""


def test_a_session_says_how_to_fork_and_its_ranks_train_as_one_process(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "ACCELERATE_USE_CPU": "true"}
    environment |= {"USE_TORCH_XLA": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-i"], input=CELLS, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=250
    )
    said = done.stdout
    assert "Received: an interactive session, which has no script." in said, said + done.stderr
    assert "from accelerate import notebook_launcher; notebook_launcher(train, num_processes=2)" in said
    ranks = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank*.json"))]
    assert [rank[:2] for rank in ranks] == [[0, 2], [1, 2]], said + done.stderr

    layer = net()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for batch in 2 * [rows()[:4], rows()[4:]]:
        optimizer.zero_grad()
        square(layer, batch).backward()
        optimizer.step()
    for _, _, own in ranks:
        torch.testing.assert_close(torch.tensor(own), layer.weight[0].detach(), rtol=1e-6, atol=1e-6)
