"""What does a compiled training step cost, next to the loop one would write by hand?

Three GANs (two optimizers, both clipped) train with xtrain, while the hand-written eager loop trains its own copy:
blocks of steps in turn, in one process, so a busy machine slows both alike. The figure to read is the median over the
blocks of the CPU time of xtrain's block over that of the hand-written one. ``large`` ends its step with
``opt.zero_grad()``, in both, so that no gradients are written out.

    python ci/bench/compiled.py                      # all three; compiling takes minutes
    python ci/bench/compiled.py --gan tiny --blocks 20
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from contenders import CLIP, GAN, LATENT, PIXELS, discriminator_loss, generator_loss
from torch import Tensor, nn

import xtrain

WARM_UP = 60  # steps of the first epoch: recordings, compilation, the trial of both
UNMEASURED = 5  # steps at the start of the second: the comparison


class ConvGAN(nn.Module):
    """A GAN of convolutions; no bias stands before a batch norm, where its gradient would be noise."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        quarter = size // 4
        self.generator = nn.Sequential(
            nn.Linear(LATENT, 2 * width * quarter**2, bias=False),
            nn.Unflatten(1, (2 * width, quarter, quarter)),
            nn.BatchNorm2d(2 * width), nn.ReLU(), nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(width), nn.ReLU(), nn.ConvTranspose2d(width, 1, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Flatten(), nn.Linear(2 * width * quarter**2, 1),
        )  # fmt: skip

    make_optimizers = GAN.make_optimizers


@dataclass(frozen=True)
class Case:
    """A GAN, its batches, the largest ratio it may have, and whether gradients are dropped after the step."""

    make: Any
    shape: tuple[int, ...]
    budget: float
    steps: int
    drops: bool = False


CASES = {
    "tiny": Case(GAN, (64, PIXELS), 0.38, 40),
    "small": Case(lambda: ConvGAN(8, 16), (64, 1, 8, 8), 0.75, 20),
    "large": Case(lambda: ConvGAN(32, 256), (8, 1, 32, 32), 1.00, 3, drops=True),
}


class ByHand:
    """The hand-written loop, step by step."""

    def __init__(self, gan: nn.Module, drops: bool) -> None:
        self.gan, self.drops = gan, drops
        self.pair = gan.make_optimizers()
        self.losses: list[float] = []

    def step(self, real: Tensor, noise: Tensor) -> None:
        gan, (opt_g, opt_d) = self.gan, self.pair
        fake = gan.generator(noise)
        loss_d = discriminator_loss(gan.discriminator, real, fake)
        opt_d.zero_grad()
        loss_d.backward()
        nn.utils.clip_grad_norm_(gan.discriminator.parameters(), CLIP)
        opt_d.step()
        loss_g = generator_loss(gan.discriminator, fake)
        opt_g.zero_grad()
        loss_g.backward()
        nn.utils.clip_grad_norm_(gan.generator.parameters(), CLIP)
        opt_g.step()
        if self.drops:
            opt_g.zero_grad()
            opt_d.zero_grad()
        if len(self.losses) < 20:
            self.losses.append(loss_g.item())


class Module(xtrain.LightningModule):
    """The same step, run by a Trainer."""

    def __init__(self, gan: nn.Module, drops: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.gan, self.drops = gan, drops
        self.losses: list[float] = []

    def configure_optimizers(self) -> Any:
        return self.gan.make_optimizers()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        real, noise = batch
        gan = self.gan
        opt_g, opt_d = self.optimizers()
        fake = gan.generator(noise)
        loss_d = discriminator_loss(gan.discriminator, real, fake)
        opt_d.zero_grad()
        self.manual_backward(loss_d)
        self.clip_gradients(opt_d, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
        opt_d.step()
        loss_g = generator_loss(gan.discriminator, fake)
        opt_g.zero_grad()
        self.manual_backward(loss_g)
        self.clip_gradients(opt_g, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
        opt_g.step()
        if self.drops:
            opt_g.zero_grad()
            opt_d.zero_grad()
        self.log_dict({"loss_g": loss_g, "loss_d": loss_d}, prog_bar=True)
        return {"loss_g": loss_g}


class Blocks:
    """Batches for the Trainer, and between them blocks of the hand-written loop; both are timed."""

    def __init__(self, by_hand: ByHand, batches: list[Any], blocks: int, steps: int) -> None:
        self.by_hand, self.batches, self.blocks, self.steps = by_hand, batches, blocks, steps
        self.times: list[tuple[float, float]] = []
        self.trainer: Any = None
        self.compiled_before = 0
        self.epoch = 0

    def __len__(self) -> int:
        return WARM_UP if self.epoch == 0 else UNMEASURED + self.blocks * self.steps + 1

    def batch(self, index: int) -> Any:
        return self.batches[index % len(self.batches)]

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        if self.epoch == 1:
            for index in range(WARM_UP):
                self.by_hand.step(*self.batch(index))
                yield self.batch(index)
            return
        step = self.trainer.compiled_step
        self.compiled_before = step.compilations if step else 0
        for index in range(UNMEASURED):
            yield self.batch(index)
        for _ in range(self.blocks):
            start = time.process_time()
            for index in range(self.steps):
                self.by_hand.step(*self.batch(index))
            middle = time.process_time()
            for index in range(self.steps):
                yield self.batch(index)
            self.times.append((time.process_time() - middle, middle - start))
        yield self.batch(0)  # so that the last block ends


class Losses(xtrain.Callback):
    """Keeps the first losses."""

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if len(module.losses) < 20:
            module.losses.append(float(outputs["loss_g"]))


def measure(case: Case, blocks: int, options: dict[str, Any]) -> dict[str, Any]:
    """Return ratio, warm-up, parity and compilations of one GAN with `options` of the Trainer."""
    torch.manual_seed(0)
    batches = [(torch.randn(case.shape), torch.randn(case.shape[0], LATENT)) for _ in range(20)]
    gan = case.make()
    loop = Blocks(ByHand(copy.deepcopy(gan), case.drops), batches, blocks, case.steps)
    module = Module(gan, case.drops)
    with tempfile.TemporaryDirectory() as folder:
        trainer = xtrain.Trainer(
            "cpu", max_epochs=2, logger=True, default_root_dir=folder, enable_progress_bar=False, callbacks=Losses(),
            enable_model_summary=False, reload_dataloaders_every_n_epochs=1, **options
        )  # fmt: skip
        loop.trainer = trainer
        module.train_dataloader = lambda: loop
        trainer.fit(module)
    ratios = [ours / theirs for ours, theirs in loop.times]
    step = trainer.compiled_step
    by_hand = statistics.median(theirs for _, theirs in loop.times) / case.steps
    ratio = statistics.median(ratios)
    seconds = step.seconds if step else 0.0
    return {
        "ratio": ratio,
        "us": by_hand * 1e6,
        "warm-up": seconds,
        "pays": seconds / (by_hand * (1 - ratio)) if ratio < 1 else float("inf"),
        "late": step.compilations - loop.compiled_before if step else 0,
        "error": max(abs(a - b) for a, b in zip(module.losses, loop.by_hand.losses, strict=True)),
        "reasons": "; ".join(step.reasons) if step else "",
        "parameters": sum(p.numel() for p in module.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare compiled training steps with the hand-written loop.")
    parser.add_argument("--gan", choices=CASES, action="append", help="default: all")
    parser.add_argument("--blocks", type=int, default=20, help="turns of both (default: 20)")
    parser.add_argument("--again", action="store_true", help="measure the warm-up of a second start, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # a loss that vanishes would slow one of both down
    print("| GAN | Trainer | ratio | by hand, us | warm-up, s | pays after steps | late | loss error | remark |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in arguments.gan or CASES:
        for options in ({}, {"fused": True}, {"compile": "step"}):
            row = measure(CASES[name], arguments.blocks, options)
            told = ", ".join(f"{key}={value!r}" for key, value in options.items()) or "eager"
            print(
                f"| {name} ({row['parameters'] / 1e6:.2g}M) | {told} | {row['ratio']:.3f} | {row['us']:.0f} | "
                f"{row['warm-up']:.1f} | {row['pays']:.0f} | {row['late']} | {row['error']:.1e} | {row['reasons']} |",
                flush=True,
            )
        kept = "kept" if row["ratio"] <= CASES[name].budget else "MISSED"
        print(f"{name}: {row['ratio']:.3f} of the hand-written loop, budget {CASES[name].budget}: {kept}", flush=True)
    if arguments.again:  # the compiler's files are there now
        subprocess.run([sys.executable, __file__, "--gan", (arguments.gan or ["tiny"])[0]], check=True)


if __name__ == "__main__":
    main()
