"""What every backend must refuse, with the same message: wrong orders, wrong arguments, wrong combinations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xtrain.contract import Capabilities
from xtrain.errors import ConfigurationError, ProtocolError
from xtrain.testing.experiments.accumulation import Accumulate
from xtrain.testing.experiments.automatic import Automatic
from xtrain.testing.experiments.closures import Closure, lbfgs
from xtrain.testing.experiments.parameters import SharedLayer
from xtrain.testing.networks import Batch, regression
from xtrain.testing.recorder import Recorder

Step = Callable[[Recorder, Batch], Any]


@dataclass(frozen=True)
class Misuse:
    """A training step that must raise instead of training something else.

    Attributes:
        name: shown as the test's id.
        step: the body of the training step, as a function of module and batch.
        says: what the message must contain, beside what was expected, what was received and the fix.
        error: what it must raise.
        scaled_only: it is wrong only where gradients are scaled.
        automatic: the module is in automatic optimization.
        early: it edits gradients before they are finalized.
    """

    name: str
    step: Step
    says: str
    error: type[Exception] = ProtocolError
    scaled_only: bool = False
    automatic: bool = False
    early: bool = False

    def __str__(self) -> str:
        return self.name

    def module(self) -> Recorder:
        """Return a module whose training step is this misuse."""
        return _Misused(self.step, self.automatic)


class _Misused(Recorder):
    def __init__(self, step: Step, automatic: bool) -> None:
        super().__init__()
        self.automatic_optimization = automatic
        self._step = step

    def configure_optimizers(self) -> Any:
        pair = super().configure_optimizers()
        return pair[1] if self.automatic_optimization else pair

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return self._step(self, batch)


def _loss(module: Recorder, batch: Batch) -> Tensor:
    return regression(module.D, *batch)


def _clip_after_step(module: Recorder, batch: Batch) -> None:
    _, d_opt = module.optimizers()
    module.manual_backward(_loss(module, batch))
    d_opt.step()
    module.clip(d_opt)


def _backward_in_automatic(module: Recorder, batch: Batch) -> Tensor:
    loss = _loss(module, batch)
    module.manual_backward(loss)
    return loss


def _raw_step(module: Recorder, batch: Batch) -> None:
    _, d_opt = module.optimizers()
    module.manual_backward(_loss(module, batch))
    d_opt.optimizer.step()


def _direct_backward(module: Recorder, batch: Batch) -> None:
    _, d_opt = module.optimizers()
    d_opt.zero_grad()
    _loss(module, batch).backward()
    d_opt.step()


def _direct_backward_on_top(module: Recorder, batch: Batch) -> None:
    _, d_opt = module.optimizers()
    d_opt.zero_grad()
    module.manual_backward(_loss(module, batch))
    _loss(module, batch).backward()
    d_opt.step()


def _edited(module: Recorder, batch: Batch) -> None:
    _, d_opt = module.optimizers()
    d_opt.zero_grad()
    module.manual_backward(_loss(module, batch))
    torch.nn.utils.clip_grad_norm_(module.D.parameters(), 0.2)
    d_opt.step()


def _replaced(module: Recorder, batch: Batch) -> None:
    _, d_opt = module.optimizers()
    d_opt.zero_grad()
    module.manual_backward(_loss(module, batch))
    for parameter in module.D.parameters():
        parameter.grad = None if parameter.grad is None else parameter.grad.sign()
    module.clip(d_opt)


def _untoggle_untoggled(module: Recorder, batch: Batch) -> None:
    g_opt, d_opt = module.optimizers()
    module.toggle_optimizer(g_opt)
    module.untoggle_optimizer(d_opt)


def _vector_loss(module: Recorder, batch: Batch) -> None:
    module.manual_backward(module.D(batch[0]))


def _no_graph(module: Recorder, batch: Batch) -> None:
    module.manual_backward(_loss(module, batch).detach())


def _foreign_optimizer(module: Recorder, batch: Batch) -> None:
    module.manual_backward(_loss(module, batch))
    module.clip(torch.optim.SGD(module.D.parameters(), lr=0.1))


def _clip_by(value: Any, algorithm: str = "norm") -> Step:
    def step(module: Recorder, batch: Batch) -> None:
        module.manual_backward(_loss(module, batch))
        opt = module.optimizers()[1]
        module.clip_gradients(opt, gradient_clip_val=value, gradient_clip_algorithm=algorithm)

    return step


MISUSES: tuple[Misuse, ...] = (
    Misuse("clip-after-step", _clip_after_step, "clip_gradients before step"),
    Misuse("manual-backward-in-automatic", _backward_in_automatic, "automatic_optimization = False", automatic=True),
    Misuse("raw-step", _raw_step, "loss scale", scaled_only=True),
    Misuse("direct-backward", _direct_backward, "loss scale", scaled_only=True),
    Misuse("direct-backward-on-top", _direct_backward_on_top, "loss scale", scaled_only=True),
    Misuse("edited-gradients", _edited, "loss scale", scaled_only=True, early=True),
    Misuse("replaced-gradients", _replaced, "loss scale", scaled_only=True, early=True),
    Misuse("untoggle-untoggled", _untoggle_untoggled, "is not"),
    Misuse("vector-loss", _vector_loss, "shape (", ConfigurationError),
    Misuse("loss-without-graph", _no_graph, "without a graph", ConfigurationError),
    Misuse("foreign-optimizer", _foreign_optimizer, "SGD", ConfigurationError),
    Misuse("clip-zero", _clip_by(0.0), "0.0", ConfigurationError),
    Misuse("clip-negative", _clip_by(-1.0), "-1.0", ConfigurationError),
    Misuse("clip-nan", _clip_by(float("nan")), "nan", ConfigurationError),
    Misuse("clip-algorithm", _clip_by(1.0, "l1"), "'l1'", ConfigurationError),
)


@dataclass(frozen=True)
class Provocation:
    """A run that one rule of the table refuses.

    Attributes:
        module: makes a module to fit.
        trainer: arguments of the Trainer.
        precision: the precision it takes; None means any the backend has.
        applies: whether a backend with these capabilities refuses it.
    """

    module: Callable[[], Recorder]
    trainer: Mapping[str, Any] = field(default_factory=dict)
    precision: str | None = None
    applies: Callable[[Capabilities], bool] = lambda capabilities: True


class _AutomaticPair(Closure):
    def __init__(self) -> None:
        super().__init__(lbfgs)
        self.automatic_optimization = True

    def configure_optimizers(self) -> list[Any]:
        return [lbfgs([p]) for p in self.parameters()]


class _AutomaticLbfgs(Closure):
    def __init__(self) -> None:
        super().__init__(lbfgs)
        self.automatic_optimization = True


PROVOCATIONS: dict[str, Provocation] = {
    "lbfgs-scaling": Provocation(partial(Closure, lbfgs), precision="16-mixed"),
    "lbfgs-backend": Provocation(partial(Closure, lbfgs), applies=lambda c: not c.reevaluating_closures),
    "lbfgs-accumulation": Provocation(_AutomaticLbfgs, {"accumulate_grad_batches": 2}),
    "shared-scaling": Provocation(SharedLayer, precision="16-mixed"),
    "shared-backend": Provocation(SharedLayer, applies=lambda c: not c.shared_parameters),
    "value-clipping": Provocation(
        Automatic,
        {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
        applies=lambda c: not c.value_clipping,
    ),
    "manual-flags": Provocation(Accumulate, {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}),
    "automatic-several": Provocation(_AutomaticPair),
    "scaler-kwargs": Provocation(Closure, {"scaler_kwargs": {"init_scale": 8.0}}, "32-true"),
    "fused": Provocation(Closure, {"fused": True}, applies=lambda c: not c.fused_optimizers),
    "compile-backend": Provocation(Closure, {"compile": "networks"}, applies=lambda c: not c.compiled_steps),
    "compile-compiler": Provocation(Closure, applies=lambda c: False),  # is about the machine
    "compile-processes": Provocation(Closure, applies=lambda c: False),  # is about the launch
    "compile-lbfgs": Provocation(partial(Closure, lbfgs), {"compile": "require"}),
    "devices": Provocation(Closure, {"devices": 2}, applies=lambda c: not c.multi_process),
}
"""One run per rule of `xtrain.rules.RULES`; the rule about precisions is tested for each of them instead."""


class UnreadableData:
    """Data that must not be read: a refusal comes before the first batch."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Batch]:
        raise AssertionError("the data was touched before the combination was refused")
