"""Small parts of the training loop: what hooks are given of a batch, and random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from xtrain.contract import Backend
from xtrain.errors import explain
from xtrain.seed import isolate_rng
from xtrain.tensors import map_tensors

BATCH_OF_NONE = explain(
    "batches from the training loader",
    "None, which trains nothing",
    "a collate_fn that returns a batch, or trainer.fit(model, steps=1000) without a loader",
)


def detached_outputs(outputs: Any, parts: int) -> dict[str, Any] | None:
    """Return what ``on_train_batch_end`` gets: a dict without graphs, None where no step ran.

    Args:
        outputs: what the training step returned: a loss, a dict, or nothing.
        parts: batches per optimizer step; the loss is divided by it, as it was for the backward. 0: no step ran.
    """
    if outputs is None:
        return {} if parts else None
    whole = outputs if isinstance(outputs, Mapping) else {"loss": outputs}
    detached = {name: map_tensors(Tensor.detach, value) for name, value in whole.items()}
    if parts > 1 and "loss" in detached:
        detached["loss"] = detached["loss"] / parts
    return detached


@contextmanager
def unchanged_random_numbers(backend: Backend) -> Iterator[None]:
    """Give every generator, that of the device too, back the state it had before the context."""
    state = backend.state_dict()
    with isolate_rng():
        yield
    backend.load_state_dict(state)
