"""What do xtrain's DeepSpeed engines cost, and what does ZeRO save?

    torchrun --nproc_per_node=2 ci/bench/zero.py time      # next to hand-written engines, by stage
    torchrun --nproc_per_node=2 ci/bench/zero.py memory    # per rank, by stage, 50 million parameters

*time*: the same GAN, both optimizers clipped by norm, is trained by xtrain and by two engines written by hand as
DeepSpeed documents them, the other network toggled off. They take turns, round after round, in the same processes;
the figure is the median over the rounds of the ratio of their CPU times on rank 0 (waiting for other processes of a
busy machine is not counted). Their parameters must agree.

*memory*: what a rank holds, module included, between two steps, and just before an optimizer steps.
"""

# ruff: noqa: E402  # DeepSpeed reads the environment when it is imported
from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
warnings.filterwarnings("ignore")

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import xtrain

CLIP, BUDGET, WARM_UP = 0.5, 1.05, 5
Batch = tuple[Tensor, Tensor]


class GAN(xtrain.LightningModule):
    """Two multi-layer perceptrons, each clipped and stepped while the other one is toggled off."""

    def __init__(self, width: int, depth: int = 2) -> None:
        super().__init__()
        self.automatic_optimization = False
        generator = torch.Generator().manual_seed(1)
        self.G, self.D = perceptron(16, width, depth, 64), perceptron(64, width, depth, 1)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / max(p.shape[-1], 16) ** 0.5)

    def configure_optimizers(self) -> Any:
        return adam(self.G), adam(self.D)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        real, noise = batch
        for opt, loss_of in ((d_opt, d_loss), (g_opt, g_loss)):
            with opt.toggle_model():
                loss = loss_of(self, real, noise)
                opt.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(opt, CLIP)
                opt.step()


def perceptron(inputs: int, width: int, depth: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(inputs, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def adam(network: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(network.parameters(), lr=1e-3, eps=1e-3)


def d_loss(gan: GAN, real: Tensor, noise: Tensor) -> Tensor:
    return softplus(-gan.D(real)).mean() + softplus(gan.D(gan.G(noise).detach())).mean()


def g_loss(gan: GAN, real: Tensor, noise: Tensor) -> Tensor:
    return softplus(-gan.D(gan.G(noise))).mean()


def batches(count: int, rows: int, rank: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(100 + rank)
    return [
        (torch.randn(rows, 64, generator=generator), torch.randn(rows, 16, generator=generator)) for _ in range(count)
    ]


# ------------------------------------------------------------------ the contenders


class Timed(xtrain.Callback):
    """Measures the steps after the warm-up, without set-up and clean-up."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == WARM_UP:
            self.begin = time.process_time()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.seconds = time.process_time() - self.begin


def fit(module: GAN, stage: int, data: list[Batch], callback: xtrain.Callback) -> None:
    options = {"stage": stage}
    trainer = xtrain.Trainer(
        "deepspeed",
        backend_options=options,
        max_epochs=1,
        callbacks=callback,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)


def by_xtrain(stage: int, width: int, data: list[Batch]) -> tuple[float, list[Tensor]]:
    module, timed = GAN(width), Timed()
    fit(module, stage, data, timed)
    return timed.seconds, [p.detach().clone() for p in module.parameters()]


def by_hand(stage: int, width: int, data: list[Batch]) -> tuple[float, list[Tensor]]:
    import deepspeed

    module = GAN(width)
    networks = (module.D, module.G)
    engines = [
        deepspeed.initialize(model=n, optimizer=adam(n), config=hand_config(stage, n), dist_init_required=False)[0]
        for n in networks
    ]
    begin = 0.0
    for index, (real, noise) in enumerate(data):
        if index == WARM_UP:
            begin = time.process_time()
        for engine, network, loss_of in zip(engines, networks, (d_loss, g_loss), strict=True):
            with toggled(network, networks):
                loss = loss_of(module, real, noise)
                engine.backward(loss)
                engine.step()
    seconds = time.process_time() - begin
    parameters = list(module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
        copies = [p.detach().clone() for p in parameters]
    for engine in engines:
        engine.destroy()
    return seconds, copies


def hand_config(stage: int, network: nn.Module) -> dict[str, Any]:
    size = sum(p.numel() for p in network.parameters())
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": CLIP,
        "managed_gradient_accumulation": False,
        "steps_per_print": 2**31 - 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": size, "overlap_comm": False},
    }


@contextlib.contextmanager
def toggled(trained: nn.Module, networks: tuple[nn.Module, ...]) -> Iterator[None]:
    for network in networks:
        network.requires_grad_(network is trained)
    try:
        yield
    finally:
        for network in networks:
            network.requires_grad_(True)


# ------------------------------------------------------------------ time


def compare(stage: int, width: int, steps: int, rounds: int, rank: int) -> float:
    """Print one row; return the ratio."""
    data = batches(WARM_UP + steps, 64, rank)
    mine, theirs, error = [], [], 0.0
    for turn in range(rounds):
        results = {c: c(stage, width, data) for c in ((by_xtrain, by_hand) if turn % 2 else (by_hand, by_xtrain))}
        pairs = zip(results[by_xtrain][1], results[by_hand][1], strict=True)
        error = max(error, *(float((a - b).abs().max()) for a, b in pairs))
        mine.append(1e3 * results[by_xtrain][0] / steps)
        theirs.append(1e3 * results[by_hand][0] / steps)
    assert error < 1e-4, f"stage {stage}: the parameters differ by {error:.1e}"
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    if rank == 0:
        cells = [f"{statistics.median(theirs):.1f}", f"{statistics.median(mine):.1f}"]
        cells += [f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}", f"{error:.0e}"]
        print(f"| {stage} | {' | '.join(cells)} |", flush=True)
    return statistics.median(ratios)


# ------------------------------------------------------------------ memory


def resident() -> float:
    """Return the resident memory of this process in MiB (Linux). Large tensors go back to the system when freed."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Measured(xtrain.Callback):
    """Reads the memory that came since this was made."""

    def __init__(self) -> None:
        self.between = self.before_step = 0.0
        self._start = resident()

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.before_step = max(self.before_step, resident() - self._start)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for optimizer in trainer.run.life.optimizers:
            optimizer.zero_grad()
        self.between = resident() - self._start


def measure(stage: int, width: int, rank: int) -> None:
    """Print one row."""
    measured, module = Measured(), GAN(width, depth=3)
    count = sum(p.numel() for p in module.parameters())
    fit(module, stage, batches(3, 4, rank), measured)
    if rank == 0:
        print(f"| {stage} | {count / 1e6:.1f} M | {measured.between:.0f} | {measured.before_step:.0f} |", flush=True)
    del module
    gc.collect()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "memory"])
    parser.add_argument("--stages", default="0,1,2,3", help="comma-separated")
    parser.add_argument("--width", type=int, help="units of a hidden layer (default: 256 for time, 3500 for memory)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    stages = [int(stage) for stage in arguments.stages.split(",")]
    by_xtrain(stages[0], 8, batches(WARM_UP + 1, 4, rank))  # starts the process group and DeepSpeed
    head = ["by hand, ms", "xtrain, ms", "ratio", "range", "difference"]
    if arguments.what == "memory":
        head = ["parameters", "MiB per rank between steps", "MiB per rank before a step"]
    if rank == 0:
        print(f"{world} process(es), torch {torch.__version__}\n| stage | {' | '.join(head)} |")
        print("|---" * (len(head) + 1) + "|", flush=True)
    if arguments.what == "memory":
        for stage in stages:
            measure(stage, arguments.width or 3500, rank)
        return 0
    ratios = [compare(s, arguments.width or 256, arguments.steps, arguments.rounds, rank) for s in stages]
    return 0 if max(ratios) <= BUDGET else 1


if __name__ == "__main__":
    sys.exit(main())
