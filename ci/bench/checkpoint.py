"""What do checkpoints cost, next to plain torch?

    python ci/bench/checkpoint.py files      # save and load of 200 million parameters
    python ci/bench/checkpoint.py steps      # a training step between two saves, with saving on and off
    python ci/bench/checkpoint.py background # how long a training stands still for a save, and what its steps cost then
    torchrun --nproc_per_node=2 ci/bench/checkpoint.py bytes    # ZeRO 2 on two processes, next to one

*files*: saving in the foreground, next to ``torch.save`` of the same tensors and an fsync; reading a checkpoint
(checksums included) and copying it into the module, next to ``torch.load`` and the copy. They take turns; the figure is
the ratio of the medians, beside it that of the processor's seconds, which a busy machine changes less. *steps*: the
same fit with a `ModelCheckpoint` that saves nothing before the end, and without. *background*: saves of a quarter of
the layers, in the foreground and in a thread; the training waits for the copy, and the thread takes the processor from
its steps.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import xtrain
from xtrain.checkpoint.finding import open_checkpoint, read_checkpoint

BUDGETS = {"save": 1.15, "load": 1.1, "step": 1.01, "bytes": 1.5}


class Model(xtrain.LightningModule):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.layers[0](batch).square().mean())
        opt.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def told(name: str, ratio: float) -> None:
    verdict = "ok" if ratio <= BUDGETS[name] else "OVER"
    print(f"{name}: {ratio:.3f}x, budget {BUDGETS[name]}x  {verdict}", flush=True)


def files(layers: int, rounds: int) -> None:
    model = Model(layers, 2048)
    trainer = xtrain.Trainer("cpu", max_steps=1, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(model, [torch.randn(1, 2048)])
    count = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        theirs = Path(folder, "x.pt")

        def torch_save() -> None:
            torch.save(model.state_dict(), theirs)
            with theirs.open("rb") as file:
                os.fsync(file.fileno())

        times: dict[str, list[tuple[float, float]]] = {}
        for number in range(rounds):
            ours = Path(folder, f"{number}.ckpt")
            tasks: dict[str, Callable[[], Any]] = {
                "torch.save": torch_save,
                "save": lambda: trainer.save_checkpoint(ours),  # noqa: B023  # called at once
                "torch.load": lambda: model.load_state_dict(torch.load(theirs, weights_only=True)),
                "load": lambda: model.load_state_dict(read_checkpoint(open_checkpoint(ours)).checkpoint["state_dict"]),  # noqa: B023
            }
            for name, task in tasks.items():
                os.sync()
                began = time.perf_counter(), time.process_time()
                task()
                taken = time.perf_counter() - began[0], time.process_time() - began[1]
                times.setdefault(name, []).append(taken)
            theirs.unlink()
            shutil.rmtree(ours)
    wall, busy = ({n: statistics.median(pair[i] for pair in found) for n, found in times.items()} for i in (0, 1))
    print(f"{count / 1e6:.0f} M parameters, seconds:", {n: (round(wall[n], 2), round(busy[n], 2)) for n in wall})
    for name in ("save", "load"):
        told(name, wall[name] / wall[f"torch.{name}"])
        print(f"  of the processor's seconds {busy[name] / busy[f'torch.{name}']:.3f}x")


def steps(rounds: int) -> None:
    def seconds(saving: bool, folder: str) -> float:
        saver = xtrain.ModelCheckpoint(folder, every_n_train_steps=10**9, every_n_epochs=0)
        trainer = xtrain.Trainer(
            "cpu",
            max_steps=4000,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[saver] if saving else [],
            logger=False,
        )
        torch.manual_seed(0)
        began = time.process_time()
        trainer.fit(Model(2, 16), [torch.ones(4, 16)] * 4001)
        return time.process_time() - began

    with tempfile.TemporaryDirectory() as folder:
        pairs = [(seconds(True, folder), seconds(False, folder)) for _ in range(rounds)]
    told("step", statistics.median(a / b for a, b in pairs))


class Clock(xtrain.Callback):
    """Sorts the seconds of training steps by whether a save went on beside them."""

    def __init__(self, saver: Any) -> None:
        self.saver = saver
        self.beside: list[float] = []
        self.alone: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        writing = self.saver._writing
        where = self.beside if writing is not None and writing.is_alive() else self.alone
        where.append(time.perf_counter() - self.began)


class Timed(xtrain.ModelCheckpoint):
    """Knows how long the training stood still for each save."""

    def _save(self, *arguments: Any, **options: Any) -> None:
        self.wait()  # what is still being written is not counted
        began = time.perf_counter()
        super()._save(*arguments, **options)
        self.stood = [*getattr(self, "stood", []), time.perf_counter() - began]


def background(layers: int, rounds: int) -> None:
    found: dict[bool, tuple[Timed, Clock]] = {}
    for thread in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            saver = Timed(folder, every_n_train_steps=40, every_n_epochs=0, background=thread)
            clock = Clock(saver)
            trainer = xtrain.Trainer("cpu", max_steps=40 * rounds, callbacks=[saver, clock], enable_progress_bar=False)
            trainer.fit(Model(layers, 2048), [torch.randn(256, 2048)] * 40 * (rounds + 1))
            found[thread] = saver, clock
    stands = {thread: statistics.median(saver.stood) for thread, (saver, _) in found.items()}
    print(f"{layers * 2048**2 / 1e6:.0f} M parameters: a save stops the training for {stands[False]:.2f} s, ", end="")
    print(f"in the background for {stands[True]:.2f} s ({stands[True] / stands[False]:.2f}x)")
    clock = found[True][1]
    if clock.beside:
        ratio = statistics.mean(clock.beside) / statistics.median(clock.alone)
        print(
            f"a step beside a writer costs {ratio:.2f}x of one alone; {len(clock.beside) / rounds:.0f} steps per save"
        )


def bytes_of_ranks() -> None:
    """Rank 0 writes the whole tensors, as a single process does; the other ranks their generators and gradients."""
    folder = Path(tempfile.gettempdir()) / f"xtrain-bytes-{os.environ.get('TORCHELASTIC_RUN_ID', 'alone')}"
    model = Model(4, 512)
    saver = xtrain.ModelCheckpoint(folder)
    xtrain.Trainer(
        "deepspeed", max_steps=2, callbacks=[saver], enable_progress_bar=False, enable_model_summary=False
    ).fit(model, [torch.ones(4, 512)] * 4)
    if int(os.environ.get("RANK", "0")) == 0:
        found = {p.name: p.stat().st_size for p in Path(saver.best_model_path).iterdir()}
        alone = sum(size for name, size in found.items() if not name.startswith("rank-") or name == "rank-00000.pt")
        told("bytes", sum(found.values()) / alone)


def main() -> int:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("files", "steps", "background", "bytes"))
    parser.add_argument("--layers", type=int, default=48, help="of four million parameters each")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "files":
        files(options.layers, options.rounds)
    elif options.what == "background":
        background(options.layers // 4, options.rounds)
    elif options.what == "steps":
        steps(options.rounds)
    else:
        bytes_of_ranks()
    return 0


if __name__ == "__main__":
    sys.exit(main())
