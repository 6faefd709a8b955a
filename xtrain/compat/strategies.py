"""Lightning's strategies and accelerators: objects given to a Trainer in place of a backend's name, and read from it.

Given, an object stands for a backend and its options. Read as ``trainer.strategy``, it tells which kind of training
runs (``isinstance(trainer.strategy, DDPStrategy)``) and passes the calls of user code on to the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from xtrain.errors import ConfigurationError, ProtocolError, explain
from xtrain.registry import get_backend_class

T = TypeVar("T")

# Arguments that change nothing here: who communicates when, and how processes are found, is the backend's matter.
_NOTHING_TO_DO = frozenset(
    {"find_unused_parameters", "gradient_as_bucket_view", "logging_batch_size_per_gpu", "logging_level"}
    | {"process_group_backend", "start_method", "state_dict_type", "static_graph"}
)


class Strategy:
    """How processes train together.

    Args:
        **arguments: those of Lightning's class that the backend has an option for, or that change nothing.

    Raises:
        ConfigurationError: for any other argument.
    """

    backend: ClassVar[str | None] = None  # None: whatever the accelerator says
    known: ClassVar[Mapping[str, Callable[[Any], dict[str, Any]]]] = {}

    def __init__(self, **arguments: Any) -> None:
        self.options: dict[str, Any] = {}
        self._trainer: Any = None
        for name, value in arguments.items():
            if name in self.known:
                self.options.update(self.known[name](value))
            elif name not in _NOTHING_TO_DO and value is not None:
                kind = type(self).__name__
                expected = f"arguments of {kind} out of {sorted(self.known) or 'none'}"
                fix = f"Trainer(backend={self.backend or 'cuda'!r}, backend_options={{...}})"
                raise ConfigurationError(explain(expected, f"{name}={value!r}", fix))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.options.items())})"

    @property
    def running(self) -> Any:
        """The Trainer that this was read from.

        Raises:
            ProtocolError: if it was made by hand.
        """
        if self._trainer is None:
            fix = "self.trainer.strategy in a hook"
            raise ProtocolError(explain("the strategy of a Trainer", f"{self!r}, made by hand", fix))
        return self._trainer

    root_device = property(lambda self: self.running.backend.device, doc="The device of this process.")
    global_rank = property(lambda self: self.running.global_rank, doc="This process, from 0.")
    local_rank = property(lambda self: self.running.local_rank, doc="This process on its host.")
    world_size = property(lambda self: self.running.world_size, doc="Number of processes.")
    is_global_zero = property(lambda self: self.running.is_global_zero, doc="Whether this is rank 0.")
    lightning_module = property(lambda self: self.running.lightning_module, doc="The module that is run.")
    model = property(lambda self: self.running.lightning_module, doc="The same; no wrapper is around it.")

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks; every one must come here."""
        self.running.barrier()

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Return `obj` of rank `src` on every rank."""
        return self.running.broadcast(obj, src)  # type: ignore[no-any-return]

    def reduce(self, tensor: Tensor, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        """Return `tensor` reduced over the ranks: ``"mean"``, ``"sum"``, ``"min"`` or ``"max"``."""
        op: Any = str(getattr(reduce_op, "name", reduce_op)).lower().replace("avg", "mean")
        return self.running.backend.collectives.all_reduce(tensor, op)  # type: ignore[no-any-return]

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Return the ranks' tensors, shape ``(world_size, *shape)``."""
        return self.running.lightning_module.all_gather(tensor, sync_grads=sync_grads)  # type: ignore[no-any-return]


def _seconds(timeout: timedelta | None) -> dict[str, Any]:
    return {} if timeout is None else {"timeout": timeout.total_seconds()}


def _offload(option: str) -> Callable[[Any], dict[str, Any]]:
    return lambda wanted: {option: "cpu"} if wanted else {}


def _classes(policy: Any) -> dict[str, Any]:
    """Return the option for a set of module classes, or for a function of name and module."""
    if policy is None or callable(policy):
        return {} if policy is None else {"shard": policy}
    classes = tuple(policy)
    return {"shard": lambda name, module: isinstance(module, classes)}


class SingleDeviceStrategy(Strategy):
    """One process."""

    known: ClassVar[Mapping[str, Callable[[Any], dict[str, Any]]]] = {"device": lambda device: {}}


class ParallelStrategy(Strategy):
    """Several processes, in whichever way."""


class DDPStrategy(ParallelStrategy):
    """Every process has the whole module; gradients are averaged."""

    known: ClassVar[Mapping[str, Callable[[Any], dict[str, Any]]]] = {"timeout": _seconds}


class DeepSpeedStrategy(ParallelStrategy):
    """DeepSpeed's ZeRO."""

    backend = "deepspeed"
    known: ClassVar[Mapping[str, Callable[[Any], dict[str, Any]]]] = {
        "zero_optimization": lambda wanted: {} if wanted else {"stage": 0},
        "stage": lambda stage: {"stage": stage},
        "offload_optimizer": _offload("offload_optimizer"),
        "offload_parameters": _offload("offload_param"),
        "config": lambda config: {} if config is None else {"config": config},
        "timeout": _seconds,
    }


class FSDPStrategy(ParallelStrategy):
    """PyTorch's fully sharded data parallel training."""

    backend = "fsdp"
    known: ClassVar[Mapping[str, Callable[[Any], dict[str, Any]]]] = {
        "auto_wrap_policy": _classes,
        "cpu_offload": _offload("offload"),
        "device_mesh": lambda mesh: {} if mesh is None else {"mesh": dict(zip(("data", "fsdp"), mesh, strict=True))},
        "timeout": _seconds,
    }


class XLAStrategy(DDPStrategy):
    """Replicas on TPU cores."""

    backend = "tpu"


class SingleDeviceXLAStrategy(SingleDeviceStrategy):
    """One TPU core."""

    backend = "tpu"


class Accelerator:
    """A kind of device; ``isinstance(trainer.accelerator, CUDAAccelerator)`` asks for it."""

    backend: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def is_available(cls) -> bool:
        """Return whether this machine has such a device."""
        return get_backend_class(cls.backend).available() is None

    @classmethod
    def name(cls) -> str:
        """Return the name of the backend."""
        return cls.backend


class CPUAccelerator(Accelerator):
    """The CPU."""

    backend = "cpu"


class CUDAAccelerator(Accelerator):
    """NVIDIA GPUs."""

    backend = "cuda"


class XLAAccelerator(Accelerator):
    """TPUs."""

    backend = "tpu"


_STRATEGIES: dict[str | None, type[Strategy]] = {kind.backend: kind for kind in (DeepSpeedStrategy, FSDPStrategy)}
_ACCELERATORS = {"cpu": CPUAccelerator, "cuda": CUDAAccelerator, "xla": XLAAccelerator}
_REPLICAS: dict[str, type[Strategy]] = {"xla": XLAStrategy}
_SINGLE: dict[str, type[Strategy]] = {"xla": SingleDeviceXLAStrategy}


def strategy_of(trainer: Any) -> Strategy:
    """Return what ``trainer.strategy`` is: of the class whose Lightning name describes the run."""
    backend, device = trainer.backend, trainer.backend.device.type
    kind: type[Strategy] = _STRATEGIES.get(backend.name) or (
        _REPLICAS.get(device, DDPStrategy) if trainer.world_size > 1 else _SINGLE.get(device, SingleDeviceStrategy)
    )
    strategy = kind()
    strategy._trainer = trainer
    return strategy


def accelerator_of(device: torch.device) -> Accelerator:
    """Return what ``trainer.accelerator`` is."""
    return _ACCELERATORS.get(device.type, Accelerator)()
