"""`clip_gradients` in the GAN: by norm, by value, and without a limit to measure the norm."""

# ruff: noqa: D102 - hooks are documented where `xtrain.hooks` declares them
from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_

from xtrain.contract import Capabilities
from xtrain.precision import Precision
from xtrain.testing.comparison import Experiment
from xtrain.testing.experiments.gan import Gan, gan
from xtrain.testing.oracle import clip_norm


class ClippedGan(Gan):
    """The GAN with `clip_gradients` before each step."""

    def __init__(self, value: float, algorithm: str = "norm") -> None:
        super().__init__()
        self.value, self.algorithm = value, algorithm

    def before_step(self, opt: Any, name: str) -> None:
        norm = self.clip_gradients(opt, gradient_clip_val=self.value, gradient_clip_algorithm=self.algorithm)
        self.note(**{name: norm})


def total_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Return the 2-norm of all gradients together, 0-dim."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return nn.utils.get_total_norm(gradients)


def clip_value(parameters: list[nn.Parameter]) -> Tensor:
    """Clip single values to 0.03 and return the norm before."""
    norm = total_norm(parameters)
    clip_grad_value_(parameters, 0.03)
    return norm


def refuses_values(capabilities: Capabilities, precision: Precision) -> str | None:
    """Clipping single values needs whole gradients."""
    return None if capabilities.value_clipping else "value-clipping"


EXPERIMENTS = (
    Experiment("gan-clip-norm", partial(ClippedGan, 0.2), partial(gan, clip=clip_norm)),
    Experiment("gan-measure-norm", partial(ClippedGan, float("inf")), partial(gan, clip=total_norm)),
    Experiment(
        "gan-clip-value",
        partial(ClippedGan, 0.03, "value"),
        partial(gan, clip=clip_value),
        refused=refuses_values,
    ),
)
