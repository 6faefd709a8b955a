"""Loads the weights of a checkpoint into a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from xtrain.errors import CheckpointError, explain


def with_masters(module: nn.Module, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the saved weights, those in a lower precision replaced by the fp32 copies that were stepped on."""
    weights = dict(checkpoint["state_dict"])
    return weights | {name: value for name, value in masters_of(checkpoint).items() if name in weights}


def masters_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the fp32 copies of parameters in a lower precision that were stepped on, by name."""
    states = checkpoint["optimizer_states"]
    found: dict[str, Tensor] = {}
    for state in states.values() if isinstance(states, dict) else ():  # Lightning has a list, and no copies
        found |= state["master"]
    return found


def load_weights(module: nn.Module, weights: Mapping[str, Any], strict: bool, remedy: str = "") -> list[str]:
    """Load a module, and return what was not loaded.

    Args:
        module: the user's.
        weights: by name.
        strict: whether everything must fit.
        remedy: the line that loads what does fit.

    Raises:
        CheckpointError: if it must and does not; the message has the first difference.
    """
    own = module.state_dict()
    found = [f"no {name}" for name in own if name not in weights]
    found += [f"{name}, which the module has not" for name in weights if name not in own]
    shapes = {n: v for n, v in weights.items() if isinstance(v, Tensor) and n in own and isinstance(own[n], Tensor)}
    other = [n for n, v in shapes.items() if v.shape != own[n].shape]
    found += [f"{n} of shape {tuple(shapes[n].shape)}, here {tuple(own[n].shape)}" for n in other]
    if found and strict:
        more = f" (and {len(found) - 1} more differences)" if len(found) > 1 else ""
        fix = remedy or "trainer.fit(model, ckpt_path='...', load=('module', 'data')), which lists what it leaves out"
        expected = f"a checkpoint of {type(module).__name__} as it is now"
        raise CheckpointError(explain(expected, f"{found[0]}{more}", fix))
    module.load_state_dict({n: v for n, v in weights.items() if n in own and n not in other}, strict=not found)
    return found
