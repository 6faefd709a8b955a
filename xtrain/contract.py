"""What a backend is: the life of a gradient, executed on one kind of device.

`LightningOptimizer` decides *when* each verb runs, in the same order everywhere::

    zero_grad -> backward -> finalize_gradients -> clip_gradients -> step -> step_boundary

A backend only executes. `finalize_gradients` runs exactly once between a backward and the step that
consumes it, so a backend may reduce and unscale there without keeping flags of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from xtrain.checkpoint import named
from xtrain.collectives import Collectives as Collectives
from xtrain.memory import Memory, memory_of
from xtrain.precision import Precision
from xtrain.tensors import map_tensors as map_tensors
from xtrain.tensors import moved


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do; the rule table decides from these facts, never from a name.

    Attributes:
        precisions: names out of `xtrain.precision.PRECISIONS`.
        reevaluating_closures: `step` may call its closure several times (LBFGS).
        value_clipping: gradients are whole when they are clipped, so single values can be clamped.
        shared_parameters: two optimizers may hold the same parameter.
        asynchronous: reading a value waits for the device, so the loop reads in batches.
        multi_process: several processes may train together.
        inference_mode: `torch.inference_mode` works; evaluation only switches gradients off otherwise.
        editable_gradients: finalized gradients are in ``.grad``, where they may be read and edited, and added to
            by another backward.
        fused_optimizers: torch has fused optimizers for the device, and they step what the groups hold.
        compiled_steps: steps are operations of torch on plain tensors, which its compiler understands.

    Example:
        >>> Capabilities(precisions=frozenset({"32-true", "bf16-mixed"}), multi_process=True).shared_parameters
        True
    """

    precisions: frozenset[str]
    reevaluating_closures: bool = True
    value_clipping: bool = True
    shared_parameters: bool = True
    asynchronous: bool = True
    multi_process: bool = False
    inference_mode: bool = True
    editable_gradients: bool = True
    fused_optimizers: bool = False
    compiled_steps: bool = False


class Phase(Enum):
    """Where the gradients of one optimizer are in their life."""

    EMPTY = "zeroed"
    ACCUMULATED = "accumulated by backward"
    FINALIZED = "averaged over ranks and unscaled"
    STEPPED = "consumed by a step"


class OptimizerHandle(Protocol):
    """An optimizer of the run, as a backend sees it; hashable by identity."""

    @property
    def optimizer(self) -> Optimizer:
        """The user's `torch.optim.Optimizer`."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The module's parameters that it trains, see `Backend.parameters_of`."""

    @property
    def phase(self) -> Phase:
        """Where its gradients are in their life."""

    @property
    def step_count(self) -> int:
        """Steps that were applied."""

    @property
    def zeroed_at(self) -> int:
        """The `step_count` when its gradients were last zeroed."""


class Backend(ABC):
    """One kind of device. Subclasses are final: mark them with `typing.final`.

    Settings that belong to a backend are keyword arguments of its ``__init__``; a Trainer is given
    either the instance (``backend=DeepSpeed(stage=3)``) or name and ``backend_options={"stage": 3}``.

    The Trainer calls, in this order: `available`, `launch`, `setup_module`, the user's
    ``configure_optimizers``, the rule table, `setup_optimizers`, then the verbs, then `teardown`.

    Attributes:
        name: the registered name, lower case.
        capabilities: see `Capabilities`.
        rules: refused combinations that only this backend knows; part of the printed table.
        spellings: values of Lightning's ``strategy=`` and ``accelerator=`` that mean this backend, each with the
            options that it implies: ``{"mychip_sharded": {"shards": 8}}``.
        in_auto: whether ``backend="auto"`` takes this backend where it is available, before the built-in ones.
        first_step: what the first step of each kind waits for, shown by the progress bar; empty: nothing.
        precision: set by the Trainer before `launch`.
        scaler_kwargs: options of the loss scaler, set by the Trainer before `launch`.
        devices: number of devices asked for (None: whatever the launcher says), set by the Trainer before `launch`.
        device: the `torch.device` of this process, set by `launch`.
        collectives: set by `launch`; the default is a run of one process.

    Example:
        >>> from xtrain_backends.cpu import CPU
        >>> backend = CPU(timeout=60.0)
        >>> CPU.available() is None, sorted(backend.capabilities.precisions)[:2]
        (True, ['16-mixed', '32-true'])
        >>> trainer = Trainer(backend=backend)
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    rules: ClassVar[tuple[Rule, ...]] = ()
    spellings: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})
    in_auto: ClassVar[bool] = False
    first_step: ClassVar[str] = ""

    precision: Precision = Precision("32-true")
    scaler_kwargs: dict[str, Any] | None = None
    devices: int | None = None
    device: torch.device = torch.device("cpu")
    collectives: Collectives = Collectives()

    # ---------------------------------------------------------------- start-up

    @classmethod
    @abstractmethod
    def available(cls) -> str | None:
        """Return None if the backend can run here, else the reason and what to do about it."""

    @abstractmethod
    def launch(self) -> None:
        """Join the launcher's processes, or start the missing ones; set `device` and `collectives`."""

    @abstractmethod
    def setup_module(self, module: nn.Module) -> None:
        """Move `module` to `device` in the policy's parameter dtype; tied parameters stay tied."""

    @abstractmethod
    def setup_optimizers(self, module: nn.Module, optimizers: Sequence[OptimizerHandle]) -> None:
        """Make engines, scalers or shards for `optimizers`, which hold the parameters that train."""

    # ---------------------------------------------------------------- the life of a gradient

    @abstractmethod
    def zero_grad(self, optimizer: OptimizerHandle, set_to_none: bool = True) -> None:
        """Drop the gradients of `optimizer`, wherever the backend keeps them."""

    @abstractmethod
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the gradients of `loss` (0-dim) to what is accumulated; extra arguments reach autograd."""

    @abstractmethod
    def finalize_gradients(self, optimizer: OptimizerHandle) -> None:
        """Make the gradients of `optimizer` true: averaged over ranks and unscaled.

        It may have none, here or on any rank, and they may be true already: those of a step that is repeated.
        """

    @abstractmethod
    def clip_gradients(self, optimizer: OptimizerHandle, value: float, algorithm: Literal["norm", "value"]) -> Tensor:
        """Clip finalized gradients in place and return their total 2-norm before clipping, 0-dim."""

    @abstractmethod
    def step(
        self, optimizer: OptimizerHandle, closure: Callable[[], Any] | None = None, **kwargs: Any
    ) -> tuple[Any, bool]:
        """Run the torch step, which gets `kwargs`. Returns its result and whether parameters were updated."""

    @abstractmethod
    def step_boundary(self) -> None:
        """End a training, validation or prediction step: launch the graph, update the loss scale."""

    # ---------------------------------------------------------------- defaults, right for whole tensors of one device

    def meet(self, call: str) -> None:
        """Note that a rank is between two steps, about to do `call`, and so must all the others be.

        Replicas make what their forwards changed the same again here.
        """
        self.collectives.meet(call)

    def check_replicas(self, module: nn.Module) -> None:  # noqa: B027  # shards differ by design
        """Raise `ProtocolError` on every rank unless the ranks hold the same parameters and buffers."""

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return a fresh context for one forward pass: autocast, another default dtype, or nothing."""
        return self.precision.forward_context(self.device.type)

    def random_stream(self) -> AbstractContextManager[Any]:
        """Return the context of a run, in which torch should draw other random numbers on each rank."""
        return nullcontext()

    def training_batches(self, loader: Iterable[Any]) -> Iterable[Any]:
        """Return the batches of an epoch. A device that compiles for each shape changes a smaller last one here."""
        return loader

    def batch_to_device(self, batch: Any) -> Any:
        """Return `batch` with its tensors on `device`, floats in the policy's parameter dtype."""
        return map_tensors(self._move, batch, self._move_object)

    def _move_object(self, item: Any) -> Any:
        item = moved(item, self.device)
        return item if self.precision.parameter_dtype is None else map_tensors(self._move, item)

    def _move(self, tensor: Tensor) -> Tensor:
        dtype = self.precision.parameter_dtype if tensor.is_floating_point() else None
        return tensor.to(self.device, dtype)

    def read_scalars(self, values: Sequence[Tensor]) -> list[float]:
        """Return 0-dim tensors as floats with as few waits for the device as it allows."""
        return torch.stack([v.detach().to(self.device, torch.float64) for v in values]).tolist() if values else []

    def to_cpu(self, data: Any) -> Any:
        """Return `data` with copies of its tensors on the CPU, in few transfers: what a file may hold."""
        return map_tensors(lambda t: t.detach().to("cpu", copy=True), data)

    def full_parameters(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Return a context in which every parameter of `module` is whole (ZeRO-3 gathers here)."""
        return nullcontext()

    def parameters_of(self, optimizer: OptimizerHandle) -> list[Tensor]:
        """Return the module's parameters that `optimizer` trains; override where shards stand in its groups."""
        return [p for group in optimizer.optimizer.param_groups for p in group["params"]]

    def local_part(self, parameter: Tensor) -> Tensor:
        """Return the memory in which this process keeps `parameter`: all of it, or its shard."""
        return parameter

    def elements_of(self, parameter: Tensor) -> int:
        """Return how many numbers the whole `parameter` has, of which a shard may know nothing."""
        return parameter.numel()

    def memory(self, module: nn.Module, optimizers: Sequence[OptimizerHandle]) -> Memory:
        """Return the bytes that this process holds in a training step of `optimizers`."""
        return memory_of(module, optimizers, lambda p: self.local_part(p).numel())

    def leaves_of(self, optimizer: OptimizerHandle) -> list[Tensor]:
        """Return the tensors into which autograd adds the gradients of `optimizer`."""
        return self.parameters_of(optimizer)

    def has_gradients(self, optimizer: OptimizerHandle) -> bool:
        """Return whether any parameter of `optimizer` has a gradient."""
        return any(p.grad is not None for p in self.parameters_of(optimizer))

    def gradient_versions(self, optimizer: OptimizerHandle) -> list[Any]:
        """Return, for each gradient of `optimizer`, what changes when it is edited or something is added to it."""
        return [None if p.grad is None else (id(p.grad), p.grad._version) for p in self.parameters_of(optimizer)]

    def unseen_gradient(self) -> str | None:
        """Return what a gradient misses when ``loss.backward()`` is called directly, or None."""
        return None

    def training_state(
        self, module: nn.Module, optimizers: Sequence[OptimizerHandle], whole: bool = True
    ) -> dict[str, Any]:
        """Return what is trained as CPU tensors by name, the same on every backend; all ranks call it.

        Args:
            module: the user's, set up.
            optimizers: those of `setup_optimizers`.
            whole: False returns tensors where they are, and a `xtrain.checkpoint.parts.Part` on every rank for shards.

        Returns:
            ``"state_dict"``: of the module; ``"optimizer_states"``: by the optimizer's name, each as
            `xtrain.checkpoint.named` describes; both on rank 0 only. ``"gradients"``: this rank's own, by
            optimizer and parameter, where they may count in a later step.
        """
        return named.taken_state(module, optimizers, self.collectives.rank == 0, self.to_cpu if whole else list)

    def load_training_state(
        self, module: nn.Module, optimizers: Sequence[OptimizerHandle], state: Mapping[str, Any]
    ) -> None:
        """Restore `optimizers` and gradients from what `training_state` of any backend returned on rank 0.

        Args:
            module: the user's, set up; its tensors were loaded before.
            optimizers: those of `setup_optimizers`; those not named in `state` are left alone.
            state: as above, with the ``"gradients"`` of this rank.

        Raises:
            CheckpointError: for an optimizer with other groups or parameters.
        """
        named.load_training_state(module, optimizers, state)

    def state_dict(self) -> dict[str, Any]:
        """Return the backend's own state (loss scale, device RNG): CPU tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  # most backends have no state
        """Restore what `state_dict` returned."""

    def teardown(self) -> None:  # noqa: B027  # nor anything to release
        """Release what `launch` and the setups took. Called once, also after an exception."""


@dataclass(frozen=True)
class Situation:
    """Everything the rules may look at, known before data is touched."""

    backend: Backend
    precision: Precision
    optimizers: Sequence[Optimizer]
    automatic: bool = False
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str | None = None
    scaler_kwargs: dict[str, object] | None = None
    devices: int | None = None
    fused: bool = False
    compile: str | None = None


@dataclass(frozen=True)
class Rule:
    """One refused combination.

    Attributes:
        id: a short stable name.
        combination: what does not go together, as shown in the table.
        reason: why not.
        fix: what to write instead.
        reference: an upstream document or a file of this project.
        check: returns what was found in a `Situation`, or None if the rule does not apply.
    """

    id: str
    combination: str
    reason: str
    fix: str
    reference: str
    check: Callable[[Situation], str | None]
