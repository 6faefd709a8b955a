"""A GAN's training step on the tpu backend next to a hand-written torch_xla loop: time and what XLA counts.

    PJRT_DEVICE=CPU python ci/bench/xla.py [--rounds 7] [--steps 20]

Both run in one process, in turns, so that a busy machine slows both; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from xtrain import Callback, LightningModule, Trainer

Batch = tuple[Tensor, Tensor]


def networks(width: int) -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 32))
    return generator, nn.Sequential(nn.Linear(32, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))


def batches(count: int) -> list[Batch]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(64, 32, generator=draw), torch.randn(64, 16, generator=draw)) for _ in range(count)]


class Gan(LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.G, self.D = networks(width)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), lr=lr) for net, lr in ((self.D, 0.002), (self.G, 0.001))]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        d_opt, g_opt = self.optimizers()
        x, z = batch
        fake = self.G(z)
        d_loss = softplus(self.D(fake.detach())).mean() + softplus(-self.D(x)).mean()
        d_opt.zero_grad()
        self.manual_backward(d_loss)
        self.clip_gradients(d_opt, gradient_clip_val=0.5)
        d_opt.step()
        g_loss = softplus(-self.D(fake)).mean()
        g_opt.zero_grad()
        self.manual_backward(g_loss)
        self.clip_gradients(g_opt, gradient_clip_val=0.5)
        g_opt.step()
        self.log_dict({"d": d_loss, "g": g_loss})


def counters() -> dict[str, int]:
    import torch_xla.core.xla_model as xm
    import torch_xla.debug.metrics as met

    xm.wait_device_ops()
    names = {"executions": "ExecuteTime", "from device": "TransferFromDeviceTime", "to device": "TransferToDeviceTime"}
    found = {label: (met.metric_data(name) or [0])[0] for label, name in names.items()}
    return {"compiles": met.counter_value("UncachedCompile") or 0, **found}


class Clock(Callback):
    """Times blocks of steps of one long fit, and lets the other contender run in between."""

    def __init__(self, steps: int, rounds: int, other: Callable[[], None]) -> None:
        self.steps, self.rounds, self.other = steps, rounds, other
        self.times: list[float] = []
        self.counts: dict[str, int] = {}
        self._start = 0.0
        self._before: dict[str, int] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.steps:
            return
        now = counters()
        if batch_idx >= 2 * self.steps:  # the first block warms up
            self.times.append((time.perf_counter() - self._start) / self.steps)
            self.counts = {name: now[name] - self._before[name] for name in now}
        if batch_idx:
            self.other()
        self._before, self._start = counters(), time.perf_counter()


def hand_written(width: int, steps: int) -> tuple[Callable[[], None], list[float], dict[str, int]]:
    """Return a block of steps as a user of torch_xla writes them, with the lists it adds to."""
    import torch_xla

    device = torch_xla.device()
    generator, discriminator = (net.to(device) for net in networks(width))
    d_opt = torch.optim.Adam(discriminator.parameters(), lr=0.002)
    g_opt = torch.optim.Adam(generator.parameters(), lr=0.001)
    data, times, counts = batches(steps), [], {}

    def block() -> None:
        before, start = counters(), time.perf_counter()
        for x, z in data:
            x, z = x.to(device), z.to(device)
            fake = generator(z)
            d_loss = softplus(discriminator(fake.detach())).mean() + softplus(-discriminator(x)).mean()
            d_opt.zero_grad()
            d_loss.backward()
            nn.utils.clip_grad_norm_(discriminator.parameters(), 0.5)
            d_opt.step()
            g_loss = softplus(-discriminator(fake)).mean()
            g_opt.zero_grad()
            g_loss.backward()
            nn.utils.clip_grad_norm_(generator.parameters(), 0.5)
            g_opt.step()
            torch_xla.sync()
        after = counters()
        times.append((time.perf_counter() - start) / steps)
        counts.update({name: after[name] - before[name] for name in after})

    return block, times, counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    import torch_xla

    torch_xla.device()
    block, by_hand, hand_counts = hand_written(options.width, options.steps)
    clock = Clock(options.steps, options.rounds, block)
    total = options.steps * (options.rounds + 2) + 1
    trainer = Trainer("tpu", max_epochs=1, callbacks=clock, enable_progress_bar=False, log_every_n_steps=10**6)
    trainer.fit(Gan(options.width), batches(total))
    ours, theirs = statistics.median(clock.times), statistics.median(by_hand[1:])
    per_step = {
        name: {key: value / options.steps for key, value in found.items()}
        for name, found in (("xtrain", clock.counts), ("hand-written", hand_counts))
    }
    times = {"xtrain": round(1e3 * ours, 3), "hand-written": round(1e3 * theirs, 3)}
    print(json.dumps({"ms per step": times, "ratio": round(ours / theirs, 3), "per step": per_step}, indent=2))


if __name__ == "__main__":
    main()
