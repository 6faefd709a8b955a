"""What does xtrain cost per training step on two processes, next to `DistributedDataParallel` by hand?

Both train the same network of some 50 million parameters on the same batches, and clip the gradients. They
take turns, round after round, in the same two processes, so a busy machine slows all of them alike; the
figure to read is the median over the rounds of each contender's time per step divided by
`DistributedDataParallel`'s of that round. That one competes twice: how far its second ratio is from 1 tells
how quiet the machine was. All must come to the same parameters.

    python ci/bench/ddp.py
    python ci/bench/ddp.py --width 1024 --depth 24 --batch 64
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from xtrain import LightningModule, Trainer
from xtrain.testing.ranks import Ranks

BUDGET = 1.05
CLIP = 1.0
UNMEASURED = 3  # steps at the start of a turn: buckets are made


def make_network(width: int, depth: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())))


def make_optimizer(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=1e-2, momentum=0.9)


class Regression(LightningModule):
    """One network, one optimizer, one step by hand."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = network

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.network)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        opt = self.optimizers()
        loss = (self.network(batch) - batch).square().mean()
        opt.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(opt, gradient_clip_val=CLIP)
        opt.step()


class Stopwatch:
    """The batches of one turn; keeps the seconds of each step that is measured."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches, self.seconds = batches, list[float]()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        for index, batch in enumerate(self.batches):
            dist.barrier()
            before = time.perf_counter()
            yield batch
            dist.barrier()
            if index >= UNMEASURED:
                self.seconds.append(time.perf_counter() - before)


# ------------------------------------------------------------------ the contenders

Train = Callable[[nn.Module, Stopwatch], None]


def with_ddp(view: bool) -> Train:
    """Return the loop by hand; with `view`, gradients lie in the buckets."""

    def train(network: nn.Module, batches: Stopwatch) -> None:
        replica = DistributedDataParallel(network, gradient_as_bucket_view=view)
        optimizer = make_optimizer(network)
        for batch in batches:
            loss = (replica(batch) - batch).square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            optimizer.step()

    return train


def with_xtrain(network: nn.Module, batches: Stopwatch) -> None:
    Trainer("cpu", max_epochs=1, enable_progress_bar=False, enable_model_summary=False).fit(
        Regression(network), batches
    )


CONTENDERS: dict[str, Train] = {
    "DistributedDataParallel": with_ddp(False),
    "DistributedDataParallel, again": with_ddp(False),
    "DistributedDataParallel, gradient_as_bucket_view": with_ddp(True),
    "xtrain": with_xtrain,
}


# ------------------------------------------------------------------ measuring


def measure(
    width: int, depth: int, batch: int, rounds: int, steps: int, world_size: int, rank: int
) -> list[list[float]]:
    """Return the median seconds per step of each contender (a row) in each round; runs on every rank.

    Raises:
        AssertionError: if a contender trained something else than the first.
    """
    Trainer("cpu", enable_progress_bar=False).backend.launch()  # joins the two processes for all contenders
    start = make_network(width, depth)
    torch.manual_seed(rank)
    batches = [torch.randn(batch, width) for _ in range(steps + UNMEASURED)]
    times: list[list[float]] = [[] for _ in CONTENDERS]
    expected: list[Tensor] = []
    for turn in range(rounds):
        order = list(enumerate(CONTENDERS.values()))
        for index, train in order[turn % len(order) :] + order[: turn % len(order)]:
            network, stopwatch = copy.deepcopy(start), Stopwatch(batches)
            train(network, stopwatch)
            times[index].append(statistics.median(stopwatch.seconds))
            expected = expected or [p.detach().clone() for p in network.parameters()]
            for ours, theirs in zip(network.parameters(), expected, strict=True):
                torch.testing.assert_close(ours.detach(), theirs, atol=1e-6, rtol=1e-5)
    return times


def summary(times: list[list[float]]) -> dict[str, dict[str, float]]:
    """Return each contender's median milliseconds, and the ratio to the first with its quartiles."""
    rows = {}
    for label, seconds in zip(CONTENDERS, times, strict=True):
        ratios = [a / b for a, b in zip(seconds, times[0], strict=True)]
        lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        milliseconds = statistics.median(seconds) * 1e3
        rows[label] = {"ms": milliseconds, "ratio": middle, "lower_quartile": lower, "upper_quartile": upper}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the cost of a step on two processes with plain torch's.")
    parser.add_argument("--width", type=int, default=2048, help="of each layer (default: 2048)")
    parser.add_argument("--depth", type=int, default=12, help="layers (default: 12, 50 million parameters)")
    parser.add_argument("--batch", type=int, default=32, help="rows per process (default: 32)")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each contender (default: 6)")
    parser.add_argument("--steps", type=int, default=8, help="measured steps in a turn (default: 8)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of a table")
    given = parser.parse_args()
    if given.rounds < 2 or given.steps < 1:
        parser.error("expected at least 2 rounds and 1 step")

    ranks = Ranks(2)
    try:
        job = partial(measure, given.width, given.depth, given.batch, given.rounds, given.steps)
        times, _ = ranks.run(job, wait=3600.0)
    finally:
        ranks.close()
    rows = summary(times)
    if given.json:
        print(json.dumps({"steps": rows, "budget": BUDGET}))
        return
    print("| loop, 2 processes | ms per step | ratio | quartiles |\n|---|---|---|---|")
    for label, row in rows.items():
        quartiles = f"{row['lower_quartile']:.2f} to {row['upper_quartile']:.2f}"
        print(f"| {label} | {row['ms']:.1f} | {row['ratio']:.3f} | {quartiles} |")
    ours = rows["xtrain"]["ratio"]
    kept = "kept" if ours <= BUDGET else "MISSED"
    print(f"\nxtrain over DistributedDataParallel: {ours:.3f}, budget {BUDGET}: {kept}")


if __name__ == "__main__":
    main()
