"""Which loaders a run reads: those given, or what a DataModule or the module returns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from xtrain.collectives import Collectives
from xtrain.data.batches import empty_loader, size_of
from xtrain.data.combined import as_loaders, combined
from xtrain.data.sharding import shard_loader, unshuffled
from xtrain.errors import ConfigurationError, explain

# By stage: the method that gives the loaders, and their name in messages.
_SOURCES = {
    "fit": ("train_dataloader", "training"),
    "validate": ("val_dataloader", "validation"),
    "test": ("test_dataloader", "test"),
    "predict": ("predict_dataloader", "predict"),
}


def read_loaders(stage: str, given: Any, owners: Iterable[Any], ranks: Collectives, shuffles: bool = True) -> list[Any]:
    """Return the loaders of `stage`, each checked and split over the ranks; none if nobody gives one.

    Args:
        stage: ``"fit"`` (one training loader at most), ``"validate"``, ``"test"`` or ``"predict"``.
        given: what the user passed to the Trainer; what an owner returns is taken if it is None.
        owners: DataModule and module; the first whose method returns something gives the loaders.
        ranks: the processes of the run.
        shuffles: False takes the order of its dataset from a loader that would shuffle.

    Raises:
        ConfigurationError: for something that cannot be iterated over, or is known to be empty.
    """
    source, _ = _SOURCES[stage]
    for owner in owners:
        if given is None:
            method = getattr(owner, source, None)  # None switches a method of the class off
            given = None if method is None else method()
    if given is None:
        return []
    found = [combined(given)] if stage == "fit" else as_loaders(given)
    for loader in found:
        _check_loader(loader, stage)
    found = found if shuffles else [unshuffled(loader) for loader in found]
    return [shard_loader(loader, ranks, evaluation=stage != "fit") for loader in found]


def _check_loader(loader: Any, stage: str) -> None:
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        fix = f"trainer.{stage}(model, DataLoader(dataset, batch_size=64))"
        raise ConfigurationError(
            explain(f"an iterable of batches as {_SOURCES[stage][1]} loader", f"{loader!r:.60}", fix)
        )
    if size_of(loader, _SOURCES[stage][1]) == 0:
        raise empty_loader(_SOURCES[stage][1])
