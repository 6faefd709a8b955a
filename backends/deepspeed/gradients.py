"""Gradients given to parameters by hand, also where stage 3 has taken their data away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def fill(parameter: nn.Parameter) -> None:
    """Give `parameter` a gradient of zeros."""
    give_gradient(parameter, torch.zeros(getattr(parameter, "ds_shape", parameter.shape)))


def give_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Give `parameter` a copy of `gradient`, which is whole, also where stage 3 has taken its data away."""
    data = parameter.data
    parameter.data = gradient.to(data.device, data.dtype, copy=True)
    parameter.grad = parameter.data  # autograd compares the shapes here, and only here
    parameter.data = data


@contextmanager
def requiring_grad(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let all of `parameters` require gradients inside the context: DeepSpeed passes over what is toggled off."""
    toggled_off = [p for p in parameters if not p.requires_grad]
    for parameter in toggled_off:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in toggled_off:
            parameter.requires_grad_(False)
