"""Where batches come from: loaders, DataModules, any iterable, or nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from xtrain.contract import Backend
from xtrain.errors import ConfigurationError, explain
from xtrain.hooks import BatchHooks, is_overridden


class LightningDataModule(BatchHooks):
    """Keeps the loaders of an experiment together; override what is needed.

    `prepare_data` runs on one process (downloads), `setup` on all.
    """

    trainer: Any = None

    def prepare_data(self) -> None:
        """Download or write files; runs on rank 0 only."""

    def setup(self, stage: str) -> None:
        """Make datasets; `stage` is fit, validate, test or predict."""

    def teardown(self, stage: str) -> None:
        """Clean up after a run, also after an exception."""

    def train_dataloader(self) -> Any:
        """Return an iterable of training batches."""

    def val_dataloader(self) -> Any:
        """Return one iterable of validation batches, or a list of them."""

    def test_dataloader(self) -> Any:
        """Return one iterable of test batches, or a list of them."""

    def predict_dataloader(self) -> Any:
        """Return one iterable of batches to predict, or a list of them."""


def size_of(loader: Any) -> int | None:
    """Return the number of batches, or None if the loader does not know."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def limited(size: int | None, limit: int | float | None, flag: str) -> int | None:
    """Return how many batches of a loader with `size` batches to use; None means all.

    Raises:
        ConfigurationError: for a fraction of an unknown size.
    """
    if limit is None or (isinstance(limit, float) and limit == 1.0):
        return size
    if isinstance(limit, float):
        if size is None:
            fix = f"Trainer({flag}=10)"
            raise ConfigurationError(explain(f"{flag} as a number, since the loader has no length", limit, fix))
        return int(size * limit)
    return limit if size is None else min(size, limit)


def with_last(loader: Iterable[Any], count: int | None, sized: bool) -> Iterator[tuple[Any, bool]]:
    """Yield ``(batch, is_last)`` for the first `count` batches.

    A loader that knows its length is never asked ahead of time. One that does not is read one batch
    ahead, which is the only way to know the last one.
    """
    batches = iter(loader) if count is None else itertools.islice(loader, count)
    if sized:
        for index, batch in enumerate(batches, 1):
            yield batch, index == count
        return
    current = next(batches, END)
    while current is not END:
        following = next(batches, END)
        yield current, following is END
        current = following


END = object()


def find_loader(name: str, given: Any, *owners: Any) -> Any:
    """Return the loader given, else what the first owner's method `name` returns, else None."""
    if given is not None:
        return given
    for owner in owners:
        method = getattr(owner, name, None)  # None switches a method of the class off
        loader = None if method is None else method()
        if loader is not None:
            return loader
    return None


def check_loader(loader: Any, name: str) -> Any:
    """Return `loader` if it can be iterated over.

    Raises:
        ConfigurationError: if not.
    """
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        fix = "trainer.fit(model, DataLoader(dataset, batch_size=64))"
        raise ConfigurationError(explain(f"an iterable of batches as {name} loader", f"{loader!r:.60}", fix))
    return loader


def nothing_left(flag: str, limit: int | float | None, size: int) -> ConfigurationError:
    """Return the error for a limit that leaves none of `size` batches."""
    received = f"{flag}={limit} of {size} batches"
    return ConfigurationError(explain("a limit that leaves a batch", received, f"Trainer({flag}=1)"))


def empty_loader(name: str) -> ConfigurationError:
    """Return the error for a loader without batches."""
    return ConfigurationError(
        explain(
            f"at least one batch from the {name} loader",
            "none (is the dataset smaller than batch_size while drop_last=True, or a generator used up?)",
            "DataLoader(dataset, batch_size=64, drop_last=False)",
        )
    )


def make_transfer(backend: Backend, *owners: Any) -> Callable[[Any, int], Any]:
    """Return ``transfer(batch, dataloader_idx)``: the owners' hooks around the backend's own move.

    Args:
        backend: moves the tensors.
        *owners: datamodule, then module; the first that overrides a hook gives it.
    """
    found: dict[str, Callable[..., Any]] = {}
    for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
        for owner in owners:
            if owner is not None and is_overridden(name, owner, BatchHooks):
                found.setdefault(name, getattr(owner, name))
    if not found:
        return lambda batch, dataloader_idx: backend.batch_to_device(batch)
    before, move, after = (
        found.get(n) for n in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    )

    def transfer(batch: Any, dataloader_idx: int) -> Any:
        if before is not None:
            batch = before(batch, dataloader_idx)
        batch = backend.batch_to_device(batch) if move is None else move(batch, backend.device, dataloader_idx)
        return batch if after is None else after(batch, dataloader_idx)

    return transfer
