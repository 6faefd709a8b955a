"""A physics-informed neural network (Raissi et al., 2019): the heat equation, first by Adam, then by LBFGS.

    python examples/pinn.py
    python examples/pinn.py --precision bf16-mixed --lbfgs 0
    python examples/pinn.py --help

The network learns u(x, t) with u_t = k u_xx, u(x, 0) = sin(pi x) and u = 0 at both ends from these equations alone.
The exact solution, exp(-k pi^2 t) sin(pi x), is used only to measure the error: relative L2 after Adam and after LBFGS.
It ends with these numbers and a picture of the solution, the error and the loss.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from common import flags, plt, save, start
from torch import Tensor, nn

from xtrain import Callback, LightningModule, Trainer

CONDUCTIVITY, WIDTH, INNER = 0.2, 32, 20


def exact(points: Tensor) -> Tensor:
    """Return the solution at points ``(n, 2)`` of position and time, both in 0..1."""
    x, t = points.unbind(dim=1)
    return torch.exp(-CONDUCTIVITY * math.pi**2 * t) * torch.sin(math.pi * x)


def collocation(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return points inside ``(n, 2)``, on the three known edges ``(m, 2)``, and the values there ``(m,)``."""
    draw = torch.Generator().manual_seed(seed)
    inside = torch.rand(1024, 2, generator=draw)
    x, t = torch.rand(128, generator=draw), torch.rand(128, generator=draw)
    start_line = torch.stack([x, torch.zeros(128)], dim=1)
    ends = torch.stack([(torch.arange(128) % 2).float(), t], dim=1)
    return inside, torch.cat([start_line, ends]), torch.cat([torch.sin(math.pi * x), torch.zeros(128)])


class HeatEquation(LightningModule):
    """One network, two optimizers of the same parameters, one after the other.

    Args:
        adam: steps of Adam before LBFGS takes over.
        lbfgs: steps of LBFGS, each of up to `INNER` iterations; 0 makes none, for backends that refuse it.
    """

    def __init__(self, adam: int, lbfgs: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.adam, self.lbfgs = adam, lbfgs
        self.evaluations = 0
        layers = (nn.Linear(2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.net = nn.Sequential(*layers, nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))

    def configure_optimizers(self) -> Any:
        adam = torch.optim.Adam(self.net.parameters(), lr=3e-3)
        if not self.lbfgs:
            return adam
        # The loss falls below 1e-6, where the usual tolerance of 1e-9 would end each step early.
        options = {"max_iter": INNER, "history_size": 50, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
        return adam, torch.optim.LBFGS(self.net.parameters(), **options)

    # --8<-- [start:step]
    def loss(self, inside: Tensor, edge: Tensor, values: Tensor) -> Tensor:
        inside = inside.clone().requires_grad_()
        u = self.net(inside).float()
        (first,) = torch.autograd.grad(u.sum(), inside, create_graph=True)
        (second,) = torch.autograd.grad(first[:, 0].sum(), inside, create_graph=True)
        residual = first[:, 1] - CONDUCTIVITY * second[:, 0]  # u_t - k u_xx
        return residual.square().mean() + 10 * (self.net(edge)[:, 0] - values).float().square().mean()

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        optimizers = self.optimizers()
        adam, lbfgs = optimizers if self.lbfgs else (optimizers, None)
        opt = adam if self.global_step < self.adam else lbfgs

        def closure() -> Tensor:
            self.evaluations += 1
            opt.zero_grad()
            loss = self.loss(*batch)
            self.manual_backward(loss)
            return loss

        loss = opt.step(closure=closure)
        self.log("loss", loss, prog_bar=True)

    # --8<-- [end:step]

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch)[:, 0]


class Errors(Callback):
    """Measures the relative L2 error on a grid now and then.

    Args:
        every: training steps between two measurements of Adam; those of LBFGS are measured each.
        last_of_adam: the step after which LBFGS takes over.
    """

    def __init__(self, every: int, last_of_adam: int) -> None:
        line = torch.linspace(0, 1, 65)
        self.grid = torch.cartesian_prod(line, line)
        self.every, self.last_of_adam = every, last_of_adam
        self.evaluations: list[int] = []
        self.errors: list[float] = []
        self.switch = 0

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every == 0 or step >= self.last_of_adam:
            with torch.no_grad():
                u = module.predict_step(self.grid.to(module.device, module.dtype), 0)
            self.evaluations.append(module.evaluations)
            self.errors.append(relative_error(trainer.backend.to_cpu(u).float(), self.grid))
            self.switch = len(self.errors) if step <= self.last_of_adam else self.switch


def relative_error(u: Tensor, points: Tensor) -> float:
    """Return the L2 norm of the error of `u` over that of the exact solution."""
    truth = exact(points)
    return ((u - truth).norm() / truth.norm()).item()


def draw(u: Tensor, errors: Errors, path: Any) -> None:
    """Save the solution, its error, and how the error fell."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.2))
    wrong = (u - exact(errors.grid)).abs()
    for axes, values, title in ((left, u, "u(x, t), learned"), (middle, wrong, "absolute error")):
        image = axes.imshow(values.view(65, 65).numpy(), origin="lower", extent=(0, 1, 0, 1), aspect="auto")
        axes.set(xlabel="t", ylabel="x", title=title)
        figure.colorbar(image, ax=axes)
    adam = slice(0, errors.switch)
    lbfgs = slice(max(errors.switch - 1, 0), None)
    right.semilogy(errors.evaluations[adam], errors.errors[adam], label="Adam")
    right.semilogy(errors.evaluations[lbfgs], errors.errors[lbfgs], label="LBFGS")
    right.set(xlabel="evaluations of the loss", title="relative L2 error")
    right.legend()
    figure.tight_layout()
    save(figure, path)


def main() -> None:
    options = flags("Solve the heat equation by a network: Adam, then LBFGS.", adam=500, lbfgs=60).parse_args()
    steps = options.adam + options.lbfgs
    errors = Errors(max(1, options.adam // 40), options.adam)
    trainer = start(options, max_epochs=1, callbacks=[errors])
    module = HeatEquation(options.adam, options.lbfgs)
    trainer.fit(module, [collocation(options.seed)] * steps)
    (u,) = trainer.predict(module, [errors.grid])

    if trainer.is_global_zero:
        options.out.mkdir(parents=True, exist_ok=True)
        u = u.float().cpu()
        draw(u, errors, options.out / "pinn.png")
        print(f"relative L2 error after Adam:  {errors.errors[errors.switch - 1]:.1e}")
        if options.lbfgs:
            print(f"relative L2 error after LBFGS: {relative_error(u, errors.grid):.1e}")
        print(f"Picture: pinn.png in {options.out}")


if __name__ == "__main__":
    main()
