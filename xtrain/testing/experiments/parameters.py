"""Parameters that are tied, shared, frozen, in no optimizer, without dimensions, or in groups."""

# ruff: noqa: D102 - hooks are documented where `xtrain.hooks` declares them
from __future__ import annotations

from typing import Any

import torch
from torch import nn

from xtrain.contract import Capabilities
from xtrain.precision import Precision
from xtrain.testing.comparison import Experiment
from xtrain.testing.networks import HIDDEN, Batch, adam, d_loss, g_loss, regression, sgd
from xtrain.testing.oracle import Plain, clip_norm, forward_regression
from xtrain.testing.recorder import OneOptimizer, Recorder


class Tied(OneOptimizer):
    """One weight matrix in two modules, as in an autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed = nn.Linear(4, HIDDEN, bias=False)
        self.transposed.weight = self.D.first.weight
        self.bias = nn.Parameter(torch.zeros(4))

    def configure_optimizers(self) -> Any:
        return sgd([*self.D.parameters(), self.bias])

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        x, z = batch
        hidden = torch.tanh(self.D.first(x))
        rebuilt = nn.functional.linear(hidden, self.transposed.weight.t(), self.bias)
        opt.zero_grad()
        self.manual_backward(nn.functional.mse_loss(rebuilt, x) + regression(self.D, x, z))
        self.note(norm=self.clip(opt), tied=self.transposed.weight is self.D.first.weight)
        opt.step()
        self.note(bias=self.bias.detach().clone())


def tied(run: Plain) -> None:
    """One weight matrix in two layers of the same optimizer."""
    layer = run.D.first
    run.back = back = nn.Linear(HIDDEN, 4).to(run.device, run.dtype)
    back.bias.data.zero_()
    opt = sgd([*run.D.parameters(), back.bias])
    run.count_steps_of(opt)
    for _, _, (x, z) in run.steps():
        with run.forward_context():
            hidden = torch.tanh(layer(x))
            rebuilt = nn.functional.linear(hidden, layer.weight.t(), back.bias)
            loss = nn.functional.mse_loss(rebuilt, x) + regression(run.D, x, z)
        opt.zero_grad()
        run.backward(loss)
        run.note(norm=clip_norm([*run.D.parameters(), back.bias]), tied=True)
        opt.step()
        run.note(bias=back.bias.detach().clone())


class SharedLayer(Recorder):
    """D's first layer belongs to both optimizers."""

    def configure_optimizers(self) -> Any:
        return sgd([*self.G.parameters(), *self.D.first.parameters()]), adam(self.D.parameters())

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, z = batch
        for opt, on_d in zip(self.optimizers(), (False, True), strict=True):
            fake = self.G(z)
            loss = d_loss(self.D, x, fake) if on_d else g_loss(self.D, fake)
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()


def shared_layer(run: Plain) -> None:
    """D's first layer belongs to both optimizers, which step one after the other."""
    pair = sgd([*run.G.parameters(), *run.D.first.parameters()]), adam(run.D.parameters())
    run.count_steps_of(*pair)
    for _, _, (x, z) in run.steps():
        for opt, on_d in zip(pair, (False, True), strict=True):
            with run.forward_context():
                fake = run.G(z)
                loss = d_loss(run.D, x, fake) if on_d else g_loss(run.D, fake)
            opt.zero_grad()
            run.backward(loss)
            opt.step()


def refuses_sharing(capabilities: Capabilities, precision: Precision) -> str | None:
    """A parameter of two optimizers needs one copy of it, and one unscaling."""
    if precision.loss_scaling:
        return "shared-scaling"
    return None if capabilities.shared_parameters else "shared-backend"


class Temperature(Recorder):
    """A learned scalar without dimensions, under an optimizer of its own, as in soft actor-critic."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def configure_optimizers(self) -> Any:
        return sgd(self.D.parameters()), sgd([self.temperature])

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        pair = self.optimizers()
        x, z = batch
        loss = nn.functional.mse_loss(self.D(x).squeeze(1) * self.temperature, z.sum(1))
        for opt in pair:
            opt.zero_grad()
        self.manual_backward(loss)
        for opt in pair:
            self.note(norm=self.clip(opt))
            opt.step()
        self.note(temperature=self.temperature.detach().clone())


def temperature(run: Plain) -> None:
    """A learned scalar without dimensions, under an optimizer of its own."""
    run.temperature = scalar = nn.Parameter(torch.tensor(0.5, device=run.device, dtype=run.dtype))
    groups = list(run.D.parameters()), [scalar]
    pair = sgd(groups[0]), sgd(groups[1])
    run.count_steps_of(*pair)
    for _, _, (x, z) in run.steps():
        with run.forward_context():
            loss = nn.functional.mse_loss(run.D(x).squeeze(1) * scalar, z.sum(1))
        for opt in pair:
            opt.zero_grad()
        run.backward(loss)
        for opt, group in zip(pair, groups, strict=True):
            run.note(norm=clip_norm(group))
            opt.step()
        run.note(temperature=scalar.detach().clone())


class Unowned(Recorder):
    """G's first bias is frozen though an optimizer holds it; D's last layer trains in no optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.G.first.bias.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return sgd(self.G.parameters()), adam(self.D.first.parameters())

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        pair = self.optimizers()
        _, z = batch
        loss = regression(self.D, self.G(z), z)
        for opt in pair:
            opt.zero_grad()
        self.manual_backward(loss)
        self.note(norm=self.clip(pair[0]))
        for opt in pair:
            opt.step()


def unowned(run: Plain) -> None:
    """G's first bias is frozen though an optimizer holds it; D's last layer trains in no optimizer."""
    run.G.first.bias.requires_grad_(False)
    pair = sgd(run.G.parameters()), adam(run.D.first.parameters())
    run.count_steps_of(*pair)
    for _, _, (_, z) in run.steps():
        with run.forward_context():
            loss = regression(run.D, run.G(z), z)
        for opt in pair:
            opt.zero_grad()
        run.backward(loss)
        run.note(norm=clip_norm([p for p in run.G.parameters() if p.requires_grad]))
        for opt in pair:
            opt.step()


class ParameterGroups(OneOptimizer):
    """Two groups with their own learning rates; the norm is that of both together."""

    def configure_optimizers(self) -> Any:
        return adam(
            [{"params": list(self.D.first.parameters())}, {"params": list(self.D.last.parameters()), "lr": 0.005}]
        )

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.loss(batch))
        self.note(norm=self.clip(opt), lr=[group["lr"] for group in opt.param_groups])
        opt.step()


def parameter_groups(run: Plain) -> None:
    """Two groups with their own learning rates; the norm is that of both together."""
    opt = adam([{"params": run.D.first.parameters()}, {"params": run.D.last.parameters(), "lr": 0.005}])
    run.count_steps_of(opt)
    for _, _, batch in run.steps():
        opt.zero_grad()
        run.backward(forward_regression(run, batch))
        run.note(norm=clip_norm(list(run.D.parameters())), lr=[g["lr"] for g in opt.param_groups])
        opt.step()


EXPERIMENTS = (
    Experiment("tied", Tied, tied),
    Experiment("shared-layer", SharedLayer, shared_layer, refused=refuses_sharing),
    Experiment("temperature", Temperature, temperature),
    Experiment("unowned", Unowned, unowned),
    Experiment("parameter-groups", ParameterGroups, parameter_groups),
)
