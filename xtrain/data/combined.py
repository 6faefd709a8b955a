"""Several loaders read together: a dict, list or tuple of them, also nested, gives batches of the same shape."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from xtrain.data.batches import END, empty_loader, size_of
from xtrain.errors import ConfigurationError, explain
from xtrain.tensors import movable

MODES = ("max_size_cycle", "max_size", "min_size", "sequential")


class CombinedLoader(Iterable[tuple[Any, int, int]]):
    """Iterates over several loaders as if they were one.

    Iterating gives ``(batch, batch_idx, dataloader_idx)``. Given to ``trainer.fit``, each step gets the
    batch alone. A dict or list of loaders that is not wrapped trains as ``"max_size_cycle"``, and is
    evaluated as ``"sequential"``.

    Args:
        iterables: a loader, or dicts, lists and tuples of loaders, nested as you like; batches have the
            same structure.
        mode: ``"min_size"`` ends with the first loader that has no more, ``"max_size_cycle"`` with the
            last while the others begin again, ``"max_size"`` with the last while the others give None;
            ``"sequential"`` reads one loader after the other, and each batch is that of one loader.

    Raises:
        ConfigurationError: for another mode, or for something among `iterables` that is no loader.

    Example:
        >>> list(CombinedLoader({"a": [1, 2, 3], "b": [4]}, "max_size_cycle"))[1]
        ({'a': 2, 'b': 4}, 1, 0)
    """

    def __init__(self, iterables: Any, mode: str = "min_size") -> None:
        if mode not in MODES:
            fix = "CombinedLoader({'a': loader_a, 'b': loader_b}, 'max_size_cycle')"
            raise ConfigurationError(explain(f"a mode out of {MODES}", repr(mode), fix))
        self.iterables, self.mode = iterables, mode

    @property
    def flattened(self) -> list[Any]:
        """The loaders in their order, without the structure around them."""
        return list(_leaves(self.iterables))

    def mapped(self, function: Callable[[Any], Any]) -> CombinedLoader:
        """Return the same of other loaders: each one is what `function` makes of it."""
        return CombinedLoader(_mapped(function, self.iterables), self.mode)

    def __len__(self) -> int:
        sizes = [len(loader) for loader in self.flattened]
        if self.mode == "sequential":
            return sum(sizes)
        return min(sizes, default=0) if self.mode == "min_size" else max(sizes, default=0)

    def __iter__(self) -> Iterator[tuple[Any, int, int]]:
        if self.mode == "sequential":
            for place, loader in enumerate(self.flattened):
                yield from ((batch, index, place) for index, batch in enumerate(loader))
        else:
            yield from ((batch, index, 0) for index, batch in enumerate(self.batches()))

    def batches(self) -> Iterator[Any]:
        """Yield the batches alone."""
        loaders = self.flattened
        if self.mode == "sequential":
            for loader in loaders:
                yield from loader
            return
        sources, ended = [iter(loader) for loader in loaders], [False] * len(loaders)
        # A known end is not looked for: a loader at its end would begin again to no purpose.
        for _ in itertools.count() if (length := size_of(self)) is None else range(length):
            parts = []
            for place, source in enumerate(sources):
                part = next(source, END)
                if part is END:
                    ended[place] = True
                    if self.mode == "min_size" or all(ended):
                        return
                    part = None if self.mode == "max_size" else self._again(sources, place)
                parts.append(part)
            yield _shaped(self.iterables, parts)

    def _again(self, sources: list[Iterator[Any]], place: int) -> Any:
        sources[place] = iter(self.flattened[place])
        batch = next(sources[place], END)
        if batch is END:
            raise empty_loader(f"training ({place + 1} of {len(sources)})")
        return batch


class TogetherLoader:
    """The batches of a `CombinedLoader` without their indices: what a training loop reads.

    Args:
        combined: what is read.
    """

    def __init__(self, combined: CombinedLoader) -> None:
        self.combined = combined

    def __len__(self) -> int:
        return len(self.combined)

    def __iter__(self) -> Iterator[Any]:
        return self.combined.batches()


def combined(loaders: Any) -> Any:
    """Return training loaders as one iterable of batches; one loader alone is returned as it is.

    Args:
        loaders: an iterable of batches (a plain list of batches too), a `CombinedLoader`, or dicts, lists and
            tuples of iterables, which are read in Lightning's mode for training, ``"max_size_cycle"``.

    Raises:
        ConfigurationError: for a dict whose values are no loaders.
    """
    if isinstance(loaders, CombinedLoader):
        return TogetherLoader(loaders)
    if isinstance(loaders, dict):
        _check_dict(loaders)
    elif not _is_collection(loaders):
        return loaders
    return TogetherLoader(CombinedLoader(loaders, "max_size_cycle"))


def as_loaders(loaders: Any) -> list[Any]:
    """Return evaluation loaders as a list: they are read one after the other.

    Args:
        loaders: None, one iterable of batches (a plain list of batches too), or dicts, lists and tuples of
            iterables; a `CombinedLoader` of another mode than ``"sequential"`` counts as one.

    Raises:
        ConfigurationError: for a dict whose values are no loaders.
    """
    if loaders is None or (isinstance(loaders, list | tuple) and not loaders):
        return []
    if isinstance(loaders, CombinedLoader):
        return loaders.flattened if loaders.mode == "sequential" else [TogetherLoader(loaders)]
    if isinstance(loaders, dict):
        _check_dict(loaders)
    return list(_leaves(loaders)) if _is_collection(loaders) else [loaders]


def is_loader(item: Any) -> bool:
    """Tell a loader, or a collection of loaders, from a batch.

    Tensors, arrays, strings, objects with a ``to`` method, and tuples, dicts and lists of them are batches.
    """
    if isinstance(item, list):
        return not any(
            isinstance(element, Tensor | int | float | str) or hasattr(element, "__array__") or movable(element)
            for element in item
        )
    if isinstance(item, dict | tuple):
        parts = list(item.values() if isinstance(item, dict) else item)
        return bool(parts) and all(is_loader(part) and not isinstance(part, list) for part in parts)
    return isinstance(item, Iterable) and not isinstance(item, Tensor | Mapping | str | bytes) and not _is_object(item)


def _is_object(item: Any) -> bool:
    """Tell an array, or what moves itself to a device."""
    return hasattr(item, "__array__") or movable(item)


def _check_dict(loaders: dict[Any, Any]) -> None:
    values = [(key, value) for key, value in loaders.items() if not (isinstance(value, list) or is_loader(value))]
    if values or not loaders:
        received = ", ".join(f"{key!r}: {type(value).__name__}" for key, value in values) or "an empty dict"
        fix = "trainer.fit(model, {'photo': DataLoader(photos), 'painting': DataLoader(paintings)})"
        raise ConfigurationError(explain("a dict of loaders", received, fix))


def _leaves(structure: Any) -> Iterator[Any]:
    if isinstance(structure, dict | list | tuple):
        for value in structure.values() if isinstance(structure, dict) else structure:
            yield from _leaves(value) if _is_collection(value) else (value,)
    else:
        yield structure


def _is_collection(structure: Any) -> bool:
    """Tell several loaders from one, which may be a list of batches."""
    if isinstance(structure, dict):
        return True
    return isinstance(structure, list | tuple) and bool(structure) and all(map(is_loader, structure))


def _shaped(structure: Any, parts: list[Any]) -> Any:
    """Return `structure` with `parts` in the places of its loaders."""
    left = iter(parts)
    return _mapped(lambda _: next(left), structure)


def _mapped(function: Callable[[Any], Any], structure: Any) -> Any:
    """Return `structure` with `function` applied to its loaders; at its top a list is one of loaders."""

    def inner(value: Any) -> Any:
        return _mapped(function, value) if _is_collection(value) else function(value)

    if isinstance(structure, dict):
        return {key: inner(value) for key, value in structure.items()}
    if not isinstance(structure, list | tuple):
        return function(structure)
    values = [inner(value) for value in structure]
    return type(structure)(*values) if hasattr(structure, "_fields") else type(structure)(values)
