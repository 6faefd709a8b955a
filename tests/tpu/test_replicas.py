"""Two replicas, for real: threads of one process with a device each, as a launcher starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fresh import fresh
from torch import nn

from xtrain import LightningModule, Trainer, errors, rank_zero_only

WORLD = 2
REPLICAS = {"CPU_NUM_DEVICES": str(WORLD), "PJRT_CPU_ASYNC_CLIENT": "0", "XLA_THREAD_POOL_SIZE": "8"}
Kind = Callable[[Any, Any], None]
_building = threading.Lock()


class Net(LightningModule):
    """Two networks with an optimizer each; `kind` says how their gradients come about.

    Args:
        kind: a name of `KINDS`.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        with _building:  # threads share torch's generator
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)
        self.kind = kind

    def configure_optimizers(self) -> Any:
        sgd = torch.optim.SGD(self.a.parameters(), lr=0.2, momentum=0.5)
        return sgd, torch.optim.Adam(self.b.parameters(), lr=0.05, eps=1e-3)

    def loss(self, net: nn.Module, x: Any) -> Any:
        return (net(x).tanh() - x[:, :4]).pow(2).mean()

    def clip(self, opt: Any) -> None:
        self.clip_gradients(opt, gradient_clip_val=0.05)

    def training_step(self, x: Any, batch_idx: int) -> None:
        getattr(self, self.kind)(x, batch_idx, *self.optimizers())
        self.log("loss", self.loss(self.a, x), sync_dist=True, on_step=False, on_epoch=True)

    def plain(self, x: Any, batch_idx: int, first: Any, second: Any) -> None:
        for net, opt in ((self.a, first), (self.b, second)):
            opt.zero_grad()
            self.manual_backward(self.loss(net, x))
            self.clip(opt)
            opt.step()

    def accumulate(self, x: Any, batch_idx: int, first: Any, second: Any, set_to_none: bool = True) -> None:
        first.zero_grad(set_to_none=set_to_none)
        for half in x.chunk(2):
            self.manual_backward(self.loss(self.a, half) / 2)
        self.clip(first)
        first.step()

    def keep_zeros(self, x: Any, batch_idx: int, first: Any, second: Any) -> None:
        self.accumulate(x, batch_idx, first, second, set_to_none=False)

    def frequencies(self, x: Any, batch_idx: int, first: Any, second: Any) -> None:
        first.zero_grad()
        self.manual_backward(self.loss(self.a, x) + self.loss(self.b, x))  # the second one accumulates
        self.clip(first)
        first.step()
        if batch_idx % 3 == 2:
            self.clip(second)
            second.step()
            second.zero_grad()


def data(steps: int = 6) -> torch.Tensor:
    return torch.randn(steps, WORLD * 8, 6, generator=torch.Generator().manual_seed(1))


def share(batch: torch.Tensor, rank: int) -> torch.Tensor:
    """This rank's rows; halves of a full batch are halves of all shares."""
    return batch.view(2, WORLD, -1, 6)[:, rank].reshape(-1, 6)


def flat(module: nn.Module) -> list[float]:
    return [value for p in module.parameters() for value in p.detach().cpu().flatten().tolist()]


def in_replicas(work: Callable[[int], Any]) -> dict[int, Any]:
    """Call ``work(rank)`` in one thread per device, as ``torch_xla.launch`` does."""
    from torch_xla._internal import pjrt

    found: dict[int, Any] = {}

    def main(rank: int) -> None:
        found[rank] = work(rank)

    pjrt._run_thread_per_device(0, 1, pjrt._SpawnFn(main), pjrt.initialize_multiprocess)
    return found


KINDS = ("plain", "accumulate", "keep_zeros", "frequencies")


def train(kind: str, rank: int, module: Net | None = None) -> tuple[Net, Trainer]:
    module = module or Net(kind)
    trainer = Trainer("tpu", max_epochs=1, enable_progress_bar=False, log_every_n_steps=3)
    trainer.fit(module, [share(batch, rank) for batch in data()])
    return module, trainer


def all_kinds() -> dict[str, Any]:
    found = in_replicas(lambda rank: {kind: run(kind, rank) for kind in KINDS})
    plain = {}
    for kind in KINDS:  # on full batches, after the runtime has started
        module = Net(kind)
        trainer = Trainer("cpu", max_epochs=1, enable_progress_bar=False)
        trainer.fit(module, list(data()))
        plain[kind] = flat(module)
    return {"replicas": found, "plain": plain}


def run(kind: str, rank: int) -> dict[str, Any]:
    module, trainer = train(kind, rank)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    place = [trainer.global_rank, trainer.world_size, str(trainer.backend.device)]
    return {"parameters": flat(module), "metrics": metrics, "place": place}


def error(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def test_replicas_train_as_one_process_on_the_full_batch():
    found = fresh(all_kinds, **REPLICAS)
    for kind in KINDS:
        first, second = (found["replicas"][str(rank)][kind] for rank in range(WORLD))
        assert first["parameters"] == second["parameters"], f"{kind}: the replicas differ"
        assert error(first["parameters"], found["plain"][kind]) < 1e-6, kind
        assert first["metrics"] == second["metrics"], "sync_dist averages over the replicas"
        assert [first["place"], second["place"]] == [[0, 2, "xla:0"], [1, 2, "xla:1"]]


# ---------------------------------------------------------------- loaders of unknown, unequal length


def unequal(rank: int, uneven: str) -> list[float]:
    module = Net("plain")
    batches = (share(batch, rank) for batch in data()[: 5 - 2 * rank])  # five here, three there
    quiet = {"max_epochs": 1, "enable_progress_bar": False}
    Trainer("tpu", uneven_batches=uneven, **quiet).fit(module, batches)
    return [module.trainer.global_step, *flat(module)]


def both_ways() -> dict[str, Any]:
    ways = ("drop", "finish")
    found = in_replicas(lambda rank: {way: unequal(rank, way) for way in ways})
    full, last = data(), share(data()[2], 1).view(2, 1, -1, 6)
    repeated = [torch.cat([share(x, 0).view(2, 1, -1, 6), last], dim=1).reshape(-1, 6) for x in full[3:5]]
    plain = {}
    for way, batches in (("drop", list(full[:3])), ("finish", [*full[:3], *repeated])):
        module = Net("plain")
        Trainer("cpu", max_epochs=1, enable_progress_bar=False).fit(module, batches)
        plain[way] = [module.trainer.global_step, *flat(module)]
    return {"replicas": found, "plain": plain}


def test_replicas_agree_on_the_end_of_loaders_of_unknown_length():
    found = fresh(both_ways, **REPLICAS)
    for way, steps in (("drop", 3), ("finish", 5)):
        first, second = (found["replicas"][str(rank)][way] for rank in range(WORLD))
        assert first == second, way
        assert first[0] == found["plain"][way][0] == steps
        assert error(first, found["plain"][way]) < 1e-6, way


# ---------------------------------------------------------------- who is the first


def who_is_first() -> dict[str, Any]:
    written = rank_zero_only(lambda: "written")

    def look(rank: int) -> list[Any]:
        seen: list[Any] = [written()]  # before any Trainer is there

        class Looks(Net):
            def on_train_start(self) -> None:
                seen.append([written(), self.trainer.is_global_zero, self.trainer.global_rank])

        trainer = Trainer("tpu", max_epochs=1, enable_progress_bar=False)
        seen.append([trainer.is_global_zero, trainer.global_rank])
        trainer.fit(Looks("plain"), [share(batch, rank) for batch in data()])
        return [*seen, written()]

    return {"before": written(), **in_replicas(look)}


def test_one_replica_is_the_first_before_during_and_after_a_run():
    found = fresh(who_is_first, **REPLICAS)
    assert found["before"] == "written"
    assert found["0"] == ["written", [True, 0], ["written", True, 0], "written"]
    assert found["1"] == [None, [False, 1], [None, False, 1], None]


# ---------------------------------------------------------------- noise of their own


class Noisy(Net):
    """Keeps the noise of its steps, in which the networks train on it."""

    def training_step(self, x: Any, batch_idx: int) -> None:
        noise = torch.randn(8, 6, device=self.device)
        self.noise = self.all_gather(noise).detach()
        super().training_step(x + noise, batch_idx)


def noise_of_all() -> Any:
    def draw(rank: int) -> Any:
        with _building:
            torch.manual_seed(3)
        module = Noisy("plain")
        train("plain", rank, module)
        return [module.noise.cpu().flatten(1).tolist(), flat(module)]

    found = in_replicas(draw)
    return [found[rank] for rank in range(WORLD)]


def test_replicas_draw_other_noise_and_stay_the_same():
    (seen, first), (seen_too, second) = fresh(noise_of_all, **REPLICAS)
    assert seen == seen_too
    assert len({round(value, 6) for row in seen for value in row}) > 90, "no number comes twice"
    assert first == second


# ---------------------------------------------------------------- that the first test can fail


def by_hand(rank: int, how: str) -> list[float]:
    """The same training without xtrain, wrong in one of two usual ways."""
    import torch_xla.core.xla_model as xm
    from xtrain_backends.xla.rendezvous import Rendezvous
    from xtrain_backends.xla.replicas import Replicas
    from xtrain_backends.xla.runtime import Runtime

    runtime = Runtime()
    runtime.rendezvous = Rendezvous.of_process(WORLD)
    net = Net("plain").to(runtime.device)
    pairs = list(zip((net.a, net.b), net.configure_optimizers(), strict=True))
    runtime.sync()
    for batch in data():
        x = share(batch, rank).to(runtime.device)
        for layer, opt in pairs:
            opt.zero_grad()
            net.loss(layer, x).backward()
            nn.utils.clip_grad_norm_(layer.parameters(), 0.05)
            if how == "clip, then average":
                Replicas(runtime).average_gradients(list(layer.parameters()), opt)
                opt.step()
            else:
                xm.optimizer_step(opt)
        runtime.sync()
    return flat(net)


def both_mistakes() -> dict[str, Any]:
    hows = ("clip, then average", "clip, then xm.optimizer_step")
    found = in_replicas(lambda rank: {how: by_hand(rank, how) for how in hows})
    module = Net("plain")
    Trainer("cpu", max_epochs=1, enable_progress_bar=False).fit(module, list(data()))
    return {how: [error(found[0][how], flat(module)), error(found[0][how], found[1][how])] for how in hows}


def test_clipping_first_and_the_plain_optimizer_step_would_be_noticed():
    found = fresh(both_mistakes, **REPLICAS)
    wrong, apart = found["clip, then average"]
    assert wrong > 1e-3
    assert apart == 0
    wrong, apart = found["clip, then xm.optimizer_step"]
    assert wrong > 1e-3
    assert apart > 1e-3, "the replicas drift apart: nothing was averaged"


# ---------------------------------------------------------------- launchers and settings


SCRIPT = """
import json, sys
sys.path[:0] = {path!r}
import torch_xla.runtime as xr
from test_replicas import flat, train
from xtrain import rank_zero_only

def main():
    first = rank_zero_only(lambda: True)() is True
    module, trainer = train("plain", xr.global_ordinal())
    result = [trainer.global_rank, trainer.world_size, first, flat(module)]
    print("RESULT " + json.dumps(result) + "\\n", end="", flush=True)
"""


def test_accelerate_launch_starts_replicas(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(path=[p for p in sys.path if p]))
    binary = Path(sys.executable).parent / "accelerate"
    command = [binary, "launch", "--tpu", "--num_processes", "2", "--main_training_function", "main", script]
    done = subprocess.run(
        command, env={**os.environ, **REPLICAS}, cwd=tmp_path, capture_output=True, text=True, timeout=250
    )
    results = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert sorted(result[:3] for result in results) == [[0, 2, True], [1, 2, False]], done.stderr[-3000:]
    assert results[0][3] == results[1][3]


def without_settings() -> str:
    try:
        in_replicas(lambda rank: train("plain", rank))
    except errors.ConfigurationError as problem:
        return str(problem)
    return "accepted"


def test_replicas_on_the_cpu_say_which_settings_they_need():
    found = fresh(without_settings, CPU_NUM_DEVICES="2", PJRT_CPU_ASYNC_CLIENT=None, XLA_THREAD_POOL_SIZE=None)
    assert "PJRT_CPU_ASYNC_CLIENT=0 XLA_THREAD_POOL_SIZE=8" in found
