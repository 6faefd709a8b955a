"""The commands of docs/launch.md, run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\| ([^|]+) \| [^|]+ \| `([^`|]+)` \|$", PAGE, re.MULTILINE)
# What the page says stands in for the hardware, and the backend and number of processes that come of it.
EXPECTED = {
    "one process": ({}, "cpu", "processes=1 (no launcher)"),
    "two processes, no launcher": ({}, "cpu", "processes=2 (given)"),
    "torchrun": ({}, "cpu", "processes=2 (torchrun, WORLD_SIZE=2)"),
    "accelerate, several GPUs": ({"ACCELERATE_USE_CPU": "true"}, "cpu", "processes=2 (accelerate, WORLD_SIZE=2)"),
    "accelerate, DeepSpeed": ({"DS_ACCELERATOR": "cpu"}, "deepspeed", "processes=2 (accelerate, WORLD_SIZE=2)"),
    "accelerate, FSDP": ({}, "fsdp", "processes=2 (accelerate, WORLD_SIZE=2)"),
    "accelerate, TPU": ({"PJRT_DEVICE": "CPU"}, "tpu", "processes=1"),
}


def test_every_command_is_tested():
    assert [what for what, _ in COMMANDS] == list(EXPECTED)
    for variables, _, _ in EXPECTED.values():
        assert all(f"{name}={value}" in PAGE for name, value in variables.items())


@pytest.mark.parametrize(("what", "command"), COMMANDS, ids=[what for what, _ in COMMANDS])
def test_command(what, command, tmp_path):
    variables, backend, processes = EXPECTED[what]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **variables}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
    if "PJRT_DEVICE" not in variables:
        environ["USE_TORCH_XLA"] = "0"  # as the page says, where torch_xla is installed
    words = [*command.split(), "--out", str(tmp_path)]
    done = subprocess.run(
        words,
        cwd=ROOT,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(f"xtrain: backend={backend} (") == 3, (
        done.stdout
    )  # rank 0, before, for and after the training
    assert processes in done.stdout
    assert done.stdout.count("Pictures: ") == 1  # rank 0 alone tells
    assert (tmp_path / "digits.png").exists()
