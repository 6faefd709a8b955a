"""Modules and helpers of single conformance tests, which compare something else than trained parameters."""

# ruff: noqa: D102 - hooks are documented where `xtrain.hooks` declares them
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import pytest
import torch

from xtrain import Trainer
from xtrain.precision import PRECISIONS
from xtrain.testing.comparison import Outcome, make_trainer, outcome_of
from xtrain.testing.experiments.gan import Gan
from xtrain.testing.networks import batches
from xtrain.testing.oracle import SCALE
from xtrain.testing.recorder import Recorder
from xtrain.testing.sequences import Plan, SequenceModule

VERBS = ("zero_grad", "backward", "finalize_gradients", "clip_gradients", "step", "step_boundary")


def fit_plan(module: SequenceModule, backend: str, precision: str, options: Mapping[str, Any], **share: int) -> Trainer:
    """Fit `module` with the data its plan needs; the loss scale, if any, grows at every boundary."""
    growing = {"scaler_kwargs": {"init_scale": SCALE, "growth_interval": 1}}
    scaled = growing if PRECISIONS[precision].loss_scaling else {}
    trainer = make_trainer(backend, precision, options, max_epochs=1, **scaled)
    with unordered_schedulers():
        trainer.fit(module, batches(len(module.plan.program), **share))
    return trainer


@contextmanager
def unordered_schedulers() -> Iterator[None]:
    """Silence torch where a random program steps a scheduler before its optimizer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler")
        yield


def perform_plan(planned: Plan, backend: str, precision: str, options: Mapping[str, Any], **share: int) -> Outcome:
    """Run a legal plan with xtrain."""
    module = SequenceModule(planned)
    return outcome_of(module, fit_plan(module, backend, precision, options, **share))


def record(backend: Any) -> list[str]:
    """Note the verbs that reach `backend` in a list, and pass them on."""
    calls: list[str] = []

    def watched(name: str, verb: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return verb(*arguments, **options)

        return call

    for name in VERBS:
        setattr(backend, name, watched(name, getattr(backend, name)))
    return calls


class Interrupted(Recorder):
    """Raises inside nested toggles, first caught by the step and then not."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.G.first.bias.requires_grad_(False)

    def flags(self) -> list[bool]:
        """Return ``requires_grad`` of a frozen bias, of G and of D."""
        return [p.requires_grad for p in (self.G.first.bias, self.G.first.weight, self.D.first.weight)]

    def _nested(self) -> None:
        g_opt, d_opt = self.optimizers()
        toggle = self.toggled_optimizer if self.spelling == "toggled_optimizer" else lambda opt: opt.toggle_model()
        with toggle(d_opt):
            try:
                with toggle(g_opt):
                    self.note(nested=self.flags())
                    raise KeyError("on purpose")
            finally:
                self.note(outer=self.flags())

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx:
            self.notes.clear()
        with pytest.raises(KeyError):
            self._nested()
        self.note(caught=self.flags())
        if batch_idx:
            self.notes = {name: values[:1] for name, values in self.notes.items()}
            self.toggle_optimizer(self.optimizers()[0])
            raise KeyError("on purpose")


class SavesState(Gan):
    """Saves the backend's state after a step and loads it again."""

    def on_train_end(self) -> None:
        backend = self.trainer.backend
        saved = backend.state_dict()
        file = BytesIO()
        torch.save(saved, file)
        file.seek(0)
        backend.load_state_dict(torch.load(file, weights_only=True))
        self.states = saved, backend.state_dict()


class KeepsBatch(Gan):
    """Stores its batch and trains nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.batch = batch


class Communicates(Gan):
    """Calls every collective that a user has, and trains nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        trainer, rank = self.trainer, self.global_rank
        # The rank is data, not a constant: on a compiling device ranks with different graphs would wait for ever.
        pair = torch.tensor([1.0 + rank, 2.0 + rank], device=self.device)
        weight = torch.tensor([2.0 + rank], device=self.device, requires_grad=True)
        plain = self.all_gather({"pair": pair, "nested": [(weight, "word")]})
        gathered = self.all_gather({"weight": weight}, sync_grads=True)["weight"]
        (gathered.square().sum() * weight.detach()).sum().backward()
        trainer.barrier()
        self.log("mean", float(rank), sync_dist=True, on_step=False, on_epoch=True)
        self.log("highest", float(rank), sync_dist=True, reduce_fx="max", on_step=False, on_epoch=True)
        self.log("own", float(rank), on_step=False, on_epoch=True)
        self.facts = {
            "pairs": plain["pair"].tolist(),
            "nested": (plain["nested"][0][0].tolist(), plain["nested"][0][1]),
            "has a graph": (plain["nested"][0][0].requires_grad, gathered.requires_grad),
            "gradient": None if weight.grad is None else weight.grad.tolist(),
            "mean of pairs": trainer.backend.collectives.all_reduce(pair).tolist(),
            "own pair": pair.tolist(),
            "object": trainer.broadcast({"rank": rank}, source=trainer.world_size - 1),
            "tensor": trainer.broadcast(pair).tolist(),
            "zero": trainer.is_global_zero,
        }


def communicate(
    backend: str, precision: str, options: Mapping[str, Any], world_size: int = 1, rank: int = 0
) -> dict[str, Any]:
    """Return what this rank received."""
    module = Communicates()
    trainer = make_trainer(backend, precision, options, max_epochs=1)
    trainer.fit(module, batches(1, world_size, rank))
    return module.facts | {name: float(value) for name, value in trainer.callback_metrics.items()}


def expected_messages(rank: int, world_size: int) -> dict[str, Any]:
    """Return what `communicate` has to return on `rank`."""
    pairs = [[1.0 + r, 2.0 + r] for r in range(world_size)]
    mean = (world_size - 1) / 2
    return {
        "pairs": pairs,
        "nested": ([[2.0 + r] for r in range(world_size)], "word"),
        "has a graph": (False, True),
        "gradient": [2 * (2.0 + rank) * sum(range(2, world_size + 2))],
        "mean of pairs": [1.0 + mean, 2.0 + mean],
        "own pair": pairs[rank],
        "object": {"rank": world_size - 1},
        "tensor": pairs[0],
        "zero": rank == 0,
        "mean": mean,
        "highest": world_size - 1.0,
        "own": float(rank),
    }
