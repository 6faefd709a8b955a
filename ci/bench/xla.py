"""A GAN's training step on the tpu backend, a hand-written torch_xla loop and Lightning: time, and what XLA counts.

    PJRT_DEVICE=CPU python ci/bench/xla.py [--rounds 7] [--steps 20]

All run in one process, in turns, so that a busy machine slows all of them; a ratio is that of the medians.
A library that is not installed is listed as such. Lightning uses a TPU only, so its search for one is overridden.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader

import xtrain

Batch = tuple[Tensor, Tensor]  # real samples (64, 32), noise (64, 16)

CLIP = 0.5
WARM_UP = 5


def networks(width: int) -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 32))
    return generator, nn.Sequential(nn.Linear(32, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))


def make_optimizers(generator: nn.Module, discriminator: nn.Module) -> list[torch.optim.Adam]:
    return [torch.optim.Adam(net.parameters(), lr=lr) for net, lr in ((discriminator, 0.002), (generator, 0.001))]


def batches(count: int) -> DataLoader[Batch]:
    draw = torch.Generator().manual_seed(1)
    rows = [(torch.randn(64, 32, generator=draw), torch.randn(64, 16, generator=draw)) for _ in range(count)]
    return DataLoader(rows, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset


def counters() -> dict[str, int]:
    import torch_xla.core.xla_model as xm
    import torch_xla.debug.metrics as met

    xm.wait_device_ops()
    names = {"executions": "ExecuteTime", "from device": "TransferFromDeviceTime", "to device": "TransferToDeviceTime"}
    found = {label: (met.metric_data(name) or [0])[0] for label, name in names.items()}
    return {"compiles": met.counter_value("UncachedCompile") or 0, **found}


class Clock:
    """Is told when a step begins; measures `steps` of them after the warm-up, until the last one was computed."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seconds = 0.0
        self.counts: dict[str, int] = {}

    def tick(self, step: int) -> None:
        if step == WARM_UP:
            self.counts, self.seconds = counters(), time.perf_counter()
        if step == WARM_UP + self.steps:
            now = counters()
            self.seconds = time.perf_counter() - self.seconds
            self.counts = {name: now[name] - before for name, before in self.counts.items()}


def module_of(base: type[Any], width: int, clock: Clock) -> Any:
    """Return the module that both xtrain and Lightning train."""

    class Gan(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.G, self.D = networks(width)

        def configure_optimizers(self) -> Any:
            return make_optimizers(self.G, self.D)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            clock.tick(batch_idx)

        def training_step(self, batch: Batch, batch_idx: int) -> None:
            d_opt, g_opt = self.optimizers()
            x, z = batch
            fake = self.G(z)
            d_loss = softplus(self.D(fake.detach())).mean() + softplus(-self.D(x)).mean()
            d_opt.zero_grad()
            self.manual_backward(d_loss)
            self.clip_gradients(d_opt, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
            d_opt.step()
            g_loss = softplus(-self.D(fake)).mean()
            g_opt.zero_grad()
            self.manual_backward(g_loss)
            self.clip_gradients(g_opt, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
            g_opt.step()
            self.log_dict({"d": d_loss, "g": g_loss})

    return Gan()


def by_hand(width: int, data: DataLoader[Batch], clock: Clock) -> None:
    """Train as a user of torch_xla writes it, without logging."""
    import torch_xla

    device = torch_xla.device()
    generator, discriminator = (net.to(device) for net in networks(width))
    d_opt, g_opt = make_optimizers(generator, discriminator)
    for step, (x, z) in enumerate(data):
        clock.tick(step)
        x, z = x.to(device), z.to(device)
        fake = generator(z)
        d_loss = softplus(discriminator(fake.detach())).mean() + softplus(-discriminator(x)).mean()
        d_opt.zero_grad()
        d_loss.backward()
        nn.utils.clip_grad_norm_(discriminator.parameters(), CLIP)
        d_opt.step()
        g_loss = softplus(-discriminator(fake)).mean()
        g_opt.zero_grad()
        g_loss.backward()
        nn.utils.clip_grad_norm_(generator.parameters(), CLIP)
        g_opt.step()
        torch_xla.sync()


def with_xtrain(width: int, data: DataLoader[Batch], clock: Clock) -> None:
    """Train with xtrain; nothing is read at log points, as in the other loops."""
    trainer = xtrain.Trainer(
        "tpu", max_epochs=1, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=10**6
    )
    trainer.fit(module_of(xtrain.LightningModule, width, clock), data)


def with_lightning(width: int, data: DataLoader[Batch], clock: Clock) -> None:
    """Train with Lightning, everything switched off that would read from the device."""
    import lightning.pytorch as pl
    from lightning.fabric.accelerators import XLAAccelerator as FabricXLA
    from lightning.pytorch.accelerators import XLAAccelerator

    for accelerator in (FabricXLA, XLAAccelerator):
        accelerator.auto_device_count = staticmethod(lambda: 1)
        accelerator.is_available = staticmethod(lambda: True)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    off = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="tpu", devices=1, max_epochs=1, log_every_n_steps=10**6, **off)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would like more loader workers
        trainer.fit(module_of(pl.LightningModule, width, clock), data)


@dataclass
class Contender:
    """One way to train the GAN, and what was measured.

    Attributes:
        label: as printed.
        package: what has to be installed for it.
        train: trains, and tells the clock.
        times: seconds per step, one entry per round.
        counts: what XLA counted in the last round, per step.
    """

    label: str
    package: str
    train: Callable[[int, DataLoader[Batch], Clock], None]
    times: list[float] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)

    def run(self, width: int, steps: int) -> None:
        clock = Clock(steps)
        self.train(width, batches(WARM_UP + steps + 1), clock)
        self.times.append(clock.seconds / steps)
        self.counts = {name: count / steps for name, count in clock.counts.items()}


def table(contenders: list[Contender]) -> str:
    """Return what was measured, in Markdown; the first contender is 1."""
    names = list(contenders[0].counts)
    lines = ["| | " + " | ".join(["ms per step", "ratio", *names]) + " |", "|---" * (len(names) + 3) + "|"]
    first = statistics.median(contenders[0].times)
    for contender in contenders:
        if not contender.times:
            lines.append(f"| {contender.label} | not installed |" + " |" * (len(names) + 1))
            continue
        median = statistics.median(contender.times)
        cells = [f"{1e3 * median:.2f}", f"{median / first:.3f}", *(f"{contender.counts[name]:g}" for name in names)]
        lines.append(f"| {contender.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    import torch_xla

    torch_xla.device()  # before the first backward
    contenders = [
        Contender("hand-written", "torch_xla", by_hand),
        Contender("hand-written, again", "torch_xla", by_hand),  # how far from 1 its ratio is, is noise
        Contender("xtrain", "xtrain", with_xtrain),
        Contender("Lightning", "lightning", with_lightning),
    ]
    installed = [contender for contender in contenders if find_spec(contender.package)]
    for number in range(options.rounds + 1):
        for contender in installed:
            contender.run(options.width, options.steps)
            if number == 0:  # it compiled
                contender.times.clear()
    print(table(contenders))


if __name__ == "__main__":
    main()
