"""Model-agnostic meta-learning (Finn et al., 2017): sinusoids from ten points, by `torch.func`.

    python examples/maml.py
    python examples/maml.py --backend tpu
    python examples/maml.py --help

A task is a sinusoid with its own amplitude and phase. The weights are trained so that one step of gradient descent on
ten points of a new task is enough; the outer gradient goes through that step. It ends with a picture of a new task
before and after few steps, and the error after each of them, beside a network that was trained on all tasks at once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from common import flags, plt, save, start
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from xtrain import LightningModule

WIDTH, SHOTS, TASKS, INNER_LR, TEST_STEPS = 40, 10, 32, 0.01, 5

Weights = dict[str, Tensor]


def draw_tasks(count: int, points: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return points ``(count, points, 1)`` of as many sinusoids, and the values there."""
    amplitude = 0.1 + 4.9 * torch.rand(count, 1, 1, device=device)
    phase = math.pi * torch.rand(count, 1, 1, device=device)
    x = 10 * torch.rand(count, points, 1, device=device) - 5
    return x, amplitude * torch.sin(x - phase)


class MAML(LightningModule):
    """Algorithm 2 of the paper.

    Args:
        inner: steps of gradient descent on each task; 0 trains on all tasks at once, to compare with.
    """

    def __init__(self, inner: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.inner = inner
        self.net = nn.Sequential(
            nn.Linear(1, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1)
        )

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), lr=1e-3)

    # --8<-- [start:step]
    def error(self, weights: Weights, x: Tensor, y: Tensor) -> Tensor:
        return (functional_call(self.net, weights, (x,)) - y).float().square().mean()

    def adapt(self, weights: Weights, x: Tensor, y: Tensor) -> Weights:
        slopes = grad(self.error)(weights, x, y)
        return {name: weight - INNER_LR * slopes[name] for name, weight in weights.items()}

    def training_step(self, batch: None, batch_idx: int) -> None:
        def loss_of_task(x: Tensor, y: Tensor) -> Tensor:
            weights = dict(self.net.named_parameters())
            for _ in range(self.inner):
                weights = self.adapt(weights, x[:SHOTS], y[:SHOTS])
            return self.error(weights, x[SHOTS:], y[SHOTS:])

        opt = self.optimizers()
        x, y = draw_tasks(TASKS, 2 * SHOTS, self.device)
        loss = vmap(loss_of_task)(x, y).mean()
        opt.zero_grad()
        self.manual_backward(loss)
        opt.step()
        self.log("loss", loss, prog_bar=True)

    # --8<-- [end:step]


@torch.no_grad()
def few_steps(module: MAML, x: Tensor, y: Tensor) -> tuple[list[float], Tensor]:
    """Adapt to each task by its first points, one step after the other.

    Returns:
        The mean error on the other points after 0, 1, 2 ... steps, and the predictions ``(steps, tasks, points)``.
    """
    weights = {name: p.detach().expand(len(x), *p.shape) for name, p in module.net.named_parameters()}
    errors, curves = [], []
    for _ in range(TEST_STEPS + 1):
        predicted = vmap(lambda w, x: functional_call(module.net, w, (x,)))(weights, x)
        curves.append(predicted[..., 0])
        errors.append((predicted - y)[:, SHOTS:].square().mean().item())
        weights = vmap(module.adapt)(weights, x[:, :SHOTS], y[:, :SHOTS])
    return errors, torch.stack(curves)


def draw(x: Tensor, y: Tensor, curves: Tensor, errors: dict[str, list[float]], path: Any) -> None:
    """Save one new task with its predictions, and the errors after each step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    order = x[:, 0].argsort()
    left.plot(x[order, 0], y[order, 0], "k", label="truth")
    left.plot(x[:SHOTS, 0], y[:SHOTS, 0], "k^", label=f"the {SHOTS} points given")
    for step, style in ((0, ":"), (1, "--"), (TEST_STEPS, "-")):
        left.plot(x[order, 0], curves[step][order], style, label=f"after {step} step{'s' * (step != 1)}")
    left.set(title="a new task")
    left.legend(fontsize="small")
    for label, values in errors.items():
        right.plot(values, "o-", label=label)
    right.set(xlabel="steps of gradient descent", title="mean squared error on 500 new tasks")
    right.legend()
    save(figure, path)


def main() -> None:
    options = flags("Learn to learn sinusoids from ten points.", steps=3000).parse_args()
    errors, curves = {}, {}
    torch.manual_seed(1)
    x, y = draw_tasks(500, SHOTS + 90, torch.device("cpu"))
    for name, inner in (("one network for all tasks", 0), ("MAML", 1)):
        trainer = start(options)
        module = MAML(inner)
        trainer.fit(module, steps=options.steps)
        if trainer.is_global_zero:
            errors[name], curves[name] = few_steps(module.cpu().float(), x, y)

    if trainer.is_global_zero:
        options.out.mkdir(parents=True, exist_ok=True)
        draw(x[0], y[0], curves["MAML"][:, 0], errors, options.out / "maml.png")
        print(f"{'mean squared error after':28}" + "".join(f"{k:>8}" for k in range(TEST_STEPS + 1)) + " steps")
        for name, values in errors.items():
            print(f"{name:28}" + "".join(f"{value:>8.2f}" for value in values))
        print(f"Picture: maml.png in {options.out}")


if __name__ == "__main__":
    main()
