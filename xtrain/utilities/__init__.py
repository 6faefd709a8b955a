"""Small functions that modules and callbacks use, named as in Lightning."""

from __future__ import annotations

import sys
from typing import Any
from warnings import warn  # not the module: this package has one of that name, Lightning's

import torch
from torch import Tensor, nn

from xtrain.compat.imports import complete
from xtrain.data.combined import CombinedLoader as CombinedLoader
from xtrain.errors import ConfigurationError, explain
from xtrain.launch.join import rank_zero_only as rank_zero_only
from xtrain.seed import isolate_rng as isolate_rng
from xtrain.tensors import map_tensors


def grad_norm(module: nn.Module, norm_type: float | int | str, group_separator: str = "/") -> dict[str, Tensor]:
    """Return the norm of each gradient of `module`, and of all of them together.

    Call it in ``on_before_optimizer_step``, where gradients are averaged and unscaled.

    Args:
        module: whose parameters are looked at; those without a gradient are left out.
        norm_type: the p of the p-norm, above 0; ``"inf"`` is the largest absolute value.
        group_separator: stands between the kind of norm and the name of the parameter.

    Returns:
        0-dim tensors under ``grad_2.0_norm/layer.weight`` and ``grad_2.0_norm_total``; nothing if no
        parameter has a gradient.

    Raises:
        ConfigurationError: if `norm_type` is not above 0.
    """
    order = float(norm_type)
    if not order > 0:
        fix = "grad_norm(self.network, norm_type=2)"
        raise ConfigurationError(explain("a norm_type above 0", repr(norm_type), fix))
    kind = f"grad_{order}_norm"
    found = [(n, torch.linalg.vector_norm(p.grad, order)) for n, p in module.named_parameters() if p.grad is not None]
    if not found:
        return {}
    total = torch.linalg.vector_norm(torch.stack([norm.to(found[0][1]) for _, norm in found]), order)
    return {**{f"{kind}{group_separator}{name}": norm for name, norm in found}, f"{kind}_total": total}


def move_data_to_device(batch: Any, device: torch.device | str) -> Any:
    """Return `batch` with the tensors of nested dicts, sequences and dataclasses on `device`."""
    return map_tensors(lambda tensor: tensor.to(device), batch)


@rank_zero_only
def rank_zero_info(*values: Any) -> None:
    """Print on rank 0, to the error stream."""
    print(*values, file=sys.stderr)


@rank_zero_only
def rank_zero_warn(message: str, category: type[Warning] = UserWarning, stacklevel: int = 4) -> None:
    """Warn on rank 0."""
    warn(message, category, stacklevel=stacklevel)


def rank_zero_deprecation(message: str, stacklevel: int = 5) -> None:
    """Warn of something that will go, on rank 0."""
    rank_zero_warn(message, DeprecationWarning, stacklevel)


complete(__name__)
