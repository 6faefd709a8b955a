"""What happens when one of two processes fails: the table of docs/launch.md, made by doing it.

Each row is a run of this very script with two ranks. In its 20th training step one rank comes to harm; the seconds
are counted from there to the end of the last process.

    python ci/bench/ranks.py                      all rows, a few minutes
    python ci/bench/ranks.py --only exception     one fault
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STEP = 20  # of 60, in which the harm is done
PAUSE = 4  # seconds of SIGSTOP before SIGCONT
TIMEOUT = 8  # seconds a rank waits for one that hangs; 600 by default
BOUND = 120
LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
}


def _raise() -> None:
    raise ValueError("on purpose")


def _pause() -> None:
    subprocess.Popen(["sh", "-c", f"sleep {PAUSE}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


FAULTS: dict[str, Callable[[], Any]] = {
    "kill -9": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGSTOP": _pause,
    "exception": _raise,
    "exit 0": lambda: sys.exit(0),
    "hang": lambda: time.sleep(600),
}
"""By name, what a rank does in the middle of a training step."""


def train(fault: str, rank: int, workers: int, mark: Path) -> None:
    """Train on two processes, one of which comes to harm.

    Args:
        fault: one of `FAULTS`.
        rank: where it happens.
        workers: of the loader, on each rank.
        mark: a file that is written when it happens.
    """
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from xtrain import Callback, LightningModule, Trainer, seed_everything

    class Saves(Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            print(f"on_exception on rank {trainer.global_rank}", flush=True)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.layer = nn.Linear(8, 1)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == STEP and self.global_rank == rank:
                mark.write_text(str(time.time()), encoding="utf-8")
                FAULTS[fault]()
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.layer(batch[0]).square().mean())
            optimizer.step()

    seed_everything(1)
    options = {"timeout": TIMEOUT} if fault == "hang" else None
    devices = None if "RANK" in os.environ else 2
    trainer = Trainer(
        "cpu",
        devices=devices,
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=Saves(),
        backend_options=options,
    )
    trainer.fit(Module(), DataLoader(TensorDataset(torch.randn(480, 8)), batch_size=4, num_workers=workers))
    print(f"rank {trainer.global_rank} came to the end", flush=True)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: seconds from the harm to the end, exit status, and all that was printed."""

    seconds: float
    status: int
    said: str

    @property
    def read(self) -> str:
        """What the user reads: the message of the last error, or that there was none."""
        errors = [line for line in self.said.splitlines() if "Error: " in line and "ChildFailed" not in line]
        signals = re.findall(r"traceback : (Signal \d+ \(\w+\))", self.said)  # what torchrun says of it
        if not errors:
            return "goes on" if "came to the end" in self.said else f"{signals[-1]} received" if signals else "nothing"
        text = errors[-1].split("Error: ", 1)[1]
        return re.sub(r"\[/.*?\] | This is typically.*?(?=\(it was)", "", text)


def run(fault: str, launcher: str = "python", rank: int = 1, workers: int = 0) -> Outcome:
    """Do it, in processes of its own.

    Raises:
        subprocess.TimeoutExpired: if the run does not end.
    """
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "mark"
        command = [*LAUNCHERS[launcher], str(Path(__file__).resolve()), "--inner", fault, "--rank", str(rank)]
        command += ["--workers", str(workers), "--mark", str(mark)]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "USE_TORCH_XLA": "0"}
        environment["XTRAIN_MANY_PROCESSES"] = "1"
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=BOUND
        )
        began = float(mark.read_text(encoding="utf-8")) if mark.exists() else time.time()
        return Outcome(time.time() - began, done.returncode, done.stdout + done.stderr)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=FAULTS)
    parser.add_argument("--inner", choices=FAULTS, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=1, help="which one comes to harm")
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--mark", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        train(options.inner, options.rank, options.workers, options.mark)
        return
    print("| on one rank | launcher | loader workers | seconds | status | `on_exception` on rank 0 | what you read |")
    print("|---|---|---|---|---|---|---|")
    for fault in [options.only] if options.only else FAULTS:
        for launcher in LAUNCHERS:
            for workers in (0, 2):
                end = run(fault, launcher, options.rank, workers)
                called = "yes" if "on_exception on rank 0" in end.said else "no"
                row = [fault, launcher, workers, f"{end.seconds:.1f}", end.status, called, end.read]
                print("|", " | ".join(map(str, row)), "|", flush=True)


if __name__ == "__main__":
    main()
