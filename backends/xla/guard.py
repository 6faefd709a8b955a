"""Notices that the graph of a training step was compiled again after its warm-up, and says why.

A step's pattern is what it did (which optimizers it zeroed, stepped...) and the shapes of its batch.
Each pattern compiles in its first two occurrences, when the state of the optimizers appears. A later
compile is a surprise that would come back on a TPU for minutes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from xtrain.errors import XTrainError, explain

from .batches import Signature
from .runtime import Runtime

_WARM_UP = 2
_SEARCH = 50  # steps for which a graph is written down after a surprise, to find where it differs


class RecompileError(XTrainError, RuntimeError):
    """A graph was compiled again after the warm-up, and the backend was told to be strict."""


class RecompileGuard:
    """Counts compiles per pattern.

    Args:
        runtime: counts them.
        strict: raise, and write every graph down so that the line is known; a step takes half as long again.
        report: is given the explanation otherwise.
    """

    def __init__(self, runtime: Runtime, strict: bool, report: Callable[[str], None]) -> None:
        self._runtime, self._strict, self._report = runtime, strict, report
        self._verbs: list[tuple[str, int]] = []
        self._signature: Signature = ()
        self._losses: list[Tensor] = []
        self._seen: dict[tuple[tuple[tuple[str, int], ...], Signature], int] = {}
        self._last_signature: dict[tuple[tuple[str, int], ...], Signature] = {}
        self._expected: set[Signature] = set()
        self._graphs: dict[object, list[str]] = {}
        self._search = 0
        self._compiles = runtime.compiles()
        runtime.name_lines(strict)

    def verb(self, name: str, optimizer: object) -> None:
        """Note what the step does."""
        self._verbs.append((name, id(optimizer)))

    def loss(self, loss: Tensor) -> None:
        """Keep a loss until the launch, if graphs are written down: only the forward knows its lines."""
        if self._strict or self._search:
            self._losses.append(loss.detach())

    def batch(self, signature: Signature) -> None:
        """Note what it does it with."""
        self._signature = signature

    def expect(self, signature: Signature) -> None:
        """Accept a graph of its own for `signature`: the user chose to compile the last batch."""
        self._expected.add(signature)

    def begin(self, holding: Iterable[object]) -> None:
        """Start a step: what hooks between two steps compiled is not its doing.

        Args:
            holding: optimizers with gradients of earlier steps. Adding to them is another graph than making them.
        """
        if not self._verbs:
            self._compiles = self._runtime.compiles()
            self._verbs.extend(("holds", id(optimizer)) for optimizer in holding)

    def launching(self, parameters: Iterable[Tensor]) -> list[str] | None:
        """Write the traced graph down, if its lines may be needed."""
        if not (self._strict or self._search):
            return None
        losses, self._losses = self._losses, []
        return self._runtime.graph_text([*parameters, *losses])

    def launched(self, graph: list[str] | None) -> None:
        """End a step.

        Raises:
            RecompileError: if it was compiled again, and the guard is strict.
        """
        pattern = tuple(self._verbs)
        self._verbs.clear()
        compiles, before = self._runtime.compiles(), self._compiles
        self._compiles = compiles
        key = (pattern, self._signature)
        occurrence = self._seen[key] = self._seen.get(key, 0) + 1
        last = self._last_signature.get(pattern)
        self._last_signature[pattern] = self._signature
        old_graph = self._remember(key, graph)
        if compiles == before:
            return
        if occurrence > _WARM_UP:
            self._surprise(_same_shapes(old_graph, graph))
        elif occurrence == 1 and last is not None and self._signature not in self._expected:
            self._surprise(_other_shapes(last, self._signature))

    def _remember(self, key: object, graph: list[str] | None) -> list[str] | None:
        if self._search:
            self._search -= 1
            self._runtime.name_lines(self._strict or self._search > 0)
        if graph is None:
            return None
        old, self._graphs[key] = self._graphs.get(key), graph
        return old

    def _surprise(self, received: str) -> None:
        fix = "a tensor on the device instead of the number; batches of one shape (drop_last, padding)"
        text = explain("no graph to be compiled after the warm-up", received, fix)
        if self._strict:
            raise RecompileError(text)
        self._report(text)
        self._search = _SEARCH
        self._runtime.name_lines(True)


def _other_shapes(last: Signature, now: Signature) -> str:
    changes = [f"{_shown(a)} became {_shown(b)}" for a, b in zip(last, now, strict=False) if a != b]
    return "another batch: " + (", ".join(changes) or f"{len(last)} tensors became {len(now)}")


def _shown(tensor: tuple[tuple[int, ...], str]) -> str:
    return f"{tensor[1]}{list(tensor[0])}"


def _same_shapes(old: Sequence[str] | None, new: Sequence[str] | None) -> str:
    """Say in which line a graph differs from the one before, if both are known."""
    cause = "a number in the step became 0, 1 or equal to another one, or the code took another branch"
    if old is None or new is None:
        return f"a batch of the same shape: {cause} (with strict=True the line is named)"
    changed = [line for line in difflib.unified_diff(old, new, n=0, lineterm="") if re.match(r"[+-] *[^+-]", line)]
    lines = [m.group(1) for line in changed if (m := re.search(r"location=([^\s,]+)", line))]
    where = next((line for line in lines if "site-packages" not in line), lines[0] if lines else "an unknown line")
    return f"a batch of the same shape: {cause}, at {where}"
