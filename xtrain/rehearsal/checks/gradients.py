"""Where each gradient comes from and where it goes: which backward reached which optimizer, what became of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from xtrain.callbacks.base import Callback
from xtrain.rehearsal.findings import Finding
from xtrain.rehearsal.places import Place, current_place

_MANY_STEPS = 3


@dataclass(eq=False)
class _Backward:
    """One backward.

    Attributes:
        place: its line.
        reached: the optimizers whose gradients it changed, by `id`.
        added: those whose gradients were not dropped after their last step.
        used: those of them that have stepped with these gradients.
        batch: of which it is.
    """

    place: Place
    reached: frozenset[int]
    added: frozenset[int]
    used: set[int] = field(default_factory=set)
    batch: int = 0


class GradientWatch(Callback):
    """Follows the gradients of a fit by the hooks around each verb.

    Attributes:
        optimizers: the raw ones.
        stepped: those that have stepped, by `id`; raw steps count, too.
        batches: that were trained.
    """

    def __init__(self) -> None:
        self.optimizers: list[Any] = []
        self.stepped: set[int] = set()
        self.batches = 0
        self._names: dict[int, str] = {}
        self._pending: dict[int, list[_Backward]] = {}
        self._stale: dict[int, int] = {}  # steps with gradients that an optimizer had stepped with before
        self._places: dict[int, Place] = {}
        self._leaks: dict[Place, tuple[int, int]] = {}
        self._thrown: dict[Place, set[int]] = {}
        self._before: dict[int, list[Any]] = {}
        self._kept: dict[int, bool] = {}
        self._done: set[int] = set()  # optimizers that have stepped since their gradients were dropped
        self._manual = True

    def name_of(self, optimizer: Any) -> str:
        """Return what messages call an optimizer."""
        return self._names.get(id(optimizer), type(optimizer).__name__)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Learn which optimizers there are."""
        self.optimizers = list(trainer.optimizers)
        self._manual = not module.automatic_optimization
        for wrapped in trainer.life.optimizers:
            self._names[id(wrapped.optimizer)] = repr(wrapped)
            self._pending[id(wrapped.optimizer)] = []
            wrapped.optimizer.register_step_post_hook(lambda optimizer, *_: self.stepped.add(id(optimizer)))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count."""
        self.batches += 1

    def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
        """Note the gradients that are dropped unused."""
        for backward in self._pending[id(optimizer)]:
            if id(optimizer) not in backward.used and backward.used:
                self._thrown.setdefault(backward.place, set()).add(id(optimizer))
        self._pending[id(optimizer)] = []
        self._done.discard(id(optimizer))

    def on_before_backward(self, trainer: Any, module: Any, loss: Any) -> None:
        """Note the gradients as they are."""
        self._before = {id(optimizer): _versions(optimizer) for optimizer in self.optimizers}
        self._kept = {id(o): id(o) in self._done and _any_nonzero(o) for o in self.optimizers}

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        """Note which of them a backward has changed."""
        now = {id(optimizer): _versions(optimizer) for optimizer in self.optimizers}
        reached = frozenset(key for key, versions in now.items() if versions != self._before[key])
        added = frozenset(key for key in reached & self._done if self._kept[key])
        backward = _Backward(current_place(), reached, added, batch=trainer.progress.batches)
        for key in reached:
            self._pending[key].append(backward)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        """Note with which gradients an optimizer steps."""
        key = id(optimizer)
        pending = self._pending[key]
        again = next((b for b in pending if key in b.added and key not in b.used), None)
        if again is not None:
            self._stale[key] = self._stale.get(key, 0) + 1
            self._places[key] = again.place
        for first in pending[:-1]:
            other = next((k for k in first.used if k != key), None)
            if other is not None and first.batch == pending[-1].batch and key not in self._done:
                self._leaks.setdefault(first.place, (other, key))
        for backward in pending:
            backward.used.add(key)
        self._done.add(key)

    def findings(self) -> Iterator[Finding]:
        """Yield what became of gradients that nobody can have meant."""
        if not self._manual:
            return
        stale = {key for key, count in self._stale.items() if count >= _MANY_STEPS}
        for key in stale:
            text = f"{self._names[key]} never drops its gradients: this adds to those that it has stepped with before"
            yield Finding("XT-PROTOCOL-08", text, "opt.zero_grad() before this line", *self._places[key])
        for place, (own, other) in self._leaks.items():
            if other not in stale:
                text = (
                    f"this loss, with which {self._names[own]} steps, leaves gradients in the parameters of "
                    f"{self._names[other]} as well, which steps with them and its own later"
                )
                fix = (
                    "with self.toggled_optimizer(opt): self.manual_backward(loss), or zero_grad() of the other between"
                )
                yield Finding("XT-PROTOCOL-09", text, fix, *place)
        for place, keys in self._thrown.items():
            names = " and ".join(self._names[key] for key in sorted(keys, key=list(self._names).index))
            text = f"this also makes gradients for {names}, which are dropped unused: time that a toggle saves"
            yield Finding(
                "XT-PROTOCOL-10", text, "opt.backward(loss), or with self.toggled_optimizer(opt): ...", *place
            )


def _any_nonzero(optimizer: Any) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for group in optimizer.param_groups for p in group["params"])


def _versions(optimizer: Any) -> list[Any]:
    """Return something that changes with every change of a gradient."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    return [None if g is None else (id(g), g._version) for g in gradients]
