"""What does xtrain cost per training step, next to the loop one would write by hand?

Every contender trains the same tiny GAN (two optimizers, both clipped) on the same batches. They take
turns in one process, round after round, so a busy machine slows all of them alike; the figure to read is
the median over the rounds of each contender's time divided by the hand-written loop's of that round. The
hand-written loop competes twice: how far its second ratio is from 1 tells how quiet the machine was.
The parameters after each turn must equal the hand-written loop's, or there is nothing to compare.

    python ci/bench/overhead.py                       # hand-written loop and xtrain
    pip install 'xtrain-torch[bench]'                       # adds Lightning, Fabric and accelerate
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator

os.environ.setdefault("USE_TORCH_XLA", "0")  # an installed torch_xla would move accelerate off the CPU

import torch
from contenders import BATCH, GAN, LATENT, PIXELS, Contender, all_contenders, by_hand
from torch import Tensor

BUDGET_STEP, BUDGET_IMPORT = 1.05, 0.2
UNMEASURED = 55  # batches at both ends of a turn: optimizer state is made, log files are opened, the epoch ends


class Stopwatch:
    """An iterable of batches that measures whoever consumes it.

    The clock runs from one request for a batch to another one `steps` batches later. A loop that
    fetches ahead makes both requests equally early, so the same number of steps lies in between.

    Args:
        batches: pairs of real samples ``(BATCH, PIXELS)`` and noise ``(BATCH, LATENT)``; the first and
            the last `UNMEASURED` of them are outside the clock.
    """

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches
        self.cpu = self.wall = 0.0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index, batch in enumerate(self.batches):
            if index == UNMEASURED:
                self.cpu, self.wall = time.process_time(), time.perf_counter()
            if index == len(self.batches) - UNMEASURED:
                self.cpu, self.wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
            yield batch


# ------------------------------------------------------------------ measuring


class Terminal(io.StringIO):
    """A terminal nobody looks at: progress bars draw as they would on a screen."""

    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Send what the contenders print to a `Terminal`, and silence their hints about settings."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(Terminal()),
        contextlib.redirect_stderr(Terminal()),
    ):
        warnings.simplefilter("ignore")
        yield


def measure_steps(contenders: list[Contender], rounds: int, steps: int) -> None:
    """Let `contenders` (the hand-written loop first) take turns, and keep their times per step.

    Raises:
        SystemExit: if one of them trained something else than the hand-written loop.
    """
    torch.manual_seed(0)
    batches = [(torch.randn(BATCH, PIXELS), torch.randn(BATCH, LATENT)) for _ in range(steps + 2 * UNMEASURED)]
    start = GAN()
    expected = copy.deepcopy(start)
    with unseen():
        by_hand(expected, Stopwatch(batches), "")
    for index in range(rounds):
        turn = index % len(contenders)
        for contender in contenders[turn:] + contenders[:turn]:
            gan, stopwatch = copy.deepcopy(start), Stopwatch(batches)
            gc.collect()  # what the one before left behind is not this one's work
            with tempfile.TemporaryDirectory() as folder, unseen():
                contender.train(gan, stopwatch, folder)
            contender.cpu.append(stopwatch.cpu / steps * 1e6)
            contender.wall.append(stopwatch.wall / steps * 1e6)
            error = max(
                (a - b).abs().max().item() for a, b in zip(gan.parameters(), expected.parameters(), strict=True)
            )
            if not error <= 1e-6:
                raise SystemExit(f"{contender.label}: parameters differ from the hand-written loop's by {error:.1e}")


def measure_imports(packages: list[str], rounds: int) -> dict[str, float]:
    """Return the median seconds that importing each package takes in a fresh process after torch."""
    program = (
        "import sys, time, torch; t = time.perf_counter(); __import__(sys.argv[1]); print(time.perf_counter() - t)"
    )
    times: dict[str, list[float]] = {package: [] for package in packages}
    for _ in range(rounds):
        for package in packages:
            command = [sys.executable, "-W", "ignore", "-c", program, package]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            times[package].append(float(output.split()[-1]))
    return {package: statistics.median(values) for package, values in times.items()}


def summary(contender: Contender, reference: Contender) -> dict[str, float]:
    """Return medians in microseconds per step, and the ratio to `reference` with its quartiles."""
    cpu = [a / b for a, b in zip(contender.cpu, reference.cpu, strict=True)]
    wall = [a / b for a, b in zip(contender.wall, reference.wall, strict=True)]
    lower, middle, upper = statistics.quantiles(cpu, n=4, method="inclusive")
    return {
        "cpu_us": statistics.median(contender.cpu),
        "wall_us": statistics.median(contender.wall),
        "cpu_ratio": middle,
        "cpu_ratio_lower_quartile": lower,
        "cpu_ratio_upper_quartile": upper,
        "wall_ratio": statistics.median(wall),
    }


# ------------------------------------------------------------------ telling


def print_tables(steps: dict[str, dict[str, float] | None], imports: dict[str, float]) -> None:
    print("| loop | CPU us per step | ratio | quartiles | wall us per step | ratio |")
    print("|---|---|---|---|---|---|")
    for label, row in steps.items():
        if row is None:
            print(f"| {label} | not installed | | | | |")
            continue
        cpu = f"{row['cpu_us']:.0f} | {row['cpu_ratio']:.3f}"
        quartiles = f"{row['cpu_ratio_lower_quartile']:.2f} to {row['cpu_ratio_upper_quartile']:.2f}"
        print(f"| {label} | {cpu} | {quartiles} | {row['wall_us']:.0f} | {row['wall_ratio']:.3f} |")
    print("\n| import, over `import torch` | seconds |\n|---|---|")
    for package, seconds in imports.items():
        print(f"| {package} | {seconds:.2f} |")


def verdict(what: str, value: float, budget: float) -> str:
    return f"{what}: {value:.3f}, budget {budget}: {'kept' if value <= budget else 'MISSED'}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the cost of a training step between libraries.")
    parser.add_argument("--rounds", type=int, default=40, help="turns of each contender (default: 40)")
    parser.add_argument("--steps", type=int, default=100, help="measured steps in a turn (default: 100)")
    parser.add_argument("--import-rounds", type=int, default=5, help="fresh processes per package (default: 5)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of tables")
    arguments = parser.parse_args()
    if arguments.rounds < 2 or arguments.steps < 1 or arguments.import_rounds < 1:
        parser.error("expected at least 2 rounds, 1 step and 1 import round")
    torch.set_num_threads(1)

    everyone = all_contenders()
    present = [c for c in everyone if importlib.util.find_spec(c.package) is not None]
    measure_steps(present, arguments.rounds, arguments.steps)
    steps = {c.label: summary(c, present[0]) if c in present else None for c in everyone}
    packages = {"xtrain": "xtrain", "lightning": "lightning.pytorch", "accelerate": "accelerate"}
    imports = measure_imports(
        [name for package, name in packages.items() if any(c.package == package for c in present)],
        arguments.import_rounds,
    )
    if arguments.json:
        print(
            json.dumps({"steps": steps, "imports": imports, "budgets": {"step": BUDGET_STEP, "import": BUDGET_IMPORT}})
        )
        return
    print_tables(steps, imports)
    ours = next(c for c in present if c.label == "xtrain")
    print("\n" + verdict("xtrain over the hand-written loop", summary(ours, present[0])["cpu_ratio"], BUDGET_STEP))
    print(verdict("import xtrain over import torch, seconds", imports["xtrain"], BUDGET_IMPORT))


if __name__ == "__main__":
    main()
