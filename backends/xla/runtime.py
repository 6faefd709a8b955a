"""What the ``tpu`` backend asks of torch_xla: one object per backend, made when a run starts.

Everything that is private to torch_xla, or differs between its releases, is called here and nowhere
else. Importing torch_xla changes a process (it patches torch and picks a device), so it happens in
`Runtime.__init__` and not at import.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xtrain.errors import BackendUnavailableError, explain

from .rendezvous import Rendezvous


class Counts(NamedTuple):
    """What torch_xla has counted in this process: graphs compiled, graphs executed, reads by the host."""

    compiles: int
    executions: int
    reads: int


class Runtime:
    """The XLA runtime of this process, started.

    Args:
        spmd: make one virtual device of all devices. Only possible before anything ran on them.
        cache: folder for compiled graphs, or None. It takes effect if nothing was compiled yet.

    Attributes:
        device: the device of this process or thread.
        cached: whether compiled graphs are kept in the folder `cache`.
        rendezvous: set where several threads of this process launch graphs together.
        calls: there, the communication in what was traced and not launched yet, in words.
        xm: ``torch_xla.core.xla_model``.
        xr: ``torch_xla.runtime``.

    Raises:
        BackendUnavailableError: if the process has done something that XLA cannot follow.
    """

    _cache_folder: Path | None = None  # of this process

    def __init__(self, spmd: bool = False, cache: Path | None = None) -> None:
        rehearse = os.environ.get("PJRT_DEVICE", "TPU").startswith("CPU")  # torch_xla makes CPU the default
        import torch_xla
        import torch_xla.core.xla_model as xm
        import torch_xla.debug.metrics as metrics
        import torch_xla.runtime as xr

        self.xm, self.xr, self._metrics = xm, xr, metrics
        self._private = torch_xla._XLAC
        self._sync = torch_xla.sync
        self.rendezvous: Rendezvous | None = None
        self.calls: list[str] = []
        self._reads: list[str] = []
        self._never: Tensor | None = None
        self.cached = cache is not None and self._keep_graphs(cache)
        if spmd and not xr.is_spmd():
            if self._private._xla_get_spmd_config_is_locked():
                received = "a process that has already used the devices one by one"
                fix = "start Trainer.fit with the mesh before any other tensor is on the TPU, or in a fresh process"
                raise BackendUnavailableError(explain("a mesh before any device is used", received, fix))
            xr.use_spmd()
        self.device: torch.device = torch_xla.device()
        if self.rehearsal and not rehearse:
            raise BackendUnavailableError(explain("a TPU", "torch_xla found none", "PJRT_DEVICE=CPU python script.py"))
        self._check_autograd()

    def _keep_graphs(self, folder: Path) -> bool:
        """Return whether compiled graphs go to `folder`: what was compiled before decides for the whole process."""
        if Runtime._cache_folder is None and not self._private._xla_computation_cache_is_initialized():
            folder.mkdir(parents=True, exist_ok=True)
            self.xr.initialize_cache(str(folder))
            Runtime._cache_folder = folder
        return Runtime._cache_folder == folder

    def _check_autograd(self) -> None:
        """Notice that a backward on another device came first: autograd then has no thread for XLA."""
        probe = torch.zeros((), device=self.device, requires_grad=True)
        try:
            with torch.enable_grad():
                (probe * 2).backward()
        except RuntimeError as error:
            received = "a loss.backward() on the CPU before the first run on this backend"
            fix = "import torch_xla; torch_xla.device() at the top of the script"
            raise BackendUnavailableError(
                explain("the XLA runtime to start before autograd is first used", received, fix)
            ) from error

    @staticmethod
    def replicas() -> int:
        """Return the number of replicas a launcher started, 1 without one."""
        import torch_xla.runtime as xr

        return int(xr.world_size())

    @property
    def rehearsal(self) -> bool:
        """Whether the devices are the CPU's (``PJRT_DEVICE=CPU``)."""
        return bool(self.xr.device_type() == "CPU")

    # ---------------------------------------------------------------- running

    def sync(self) -> None:
        """Launch everything that was traced, as one graph. Does not wait for it."""
        calls, self.calls, self._reads = self.calls, [], []
        if self.rendezvous is None:
            self._sync()
        elif calls:
            self.calls = calls  # still those, if the replicas do not agree on them
            self.rendezvous.launch(self._sync, self.xr.global_ordinal(), "; ".join(calls))
            self.calls = []
        else:  # nobody is waited for: replicas may evaluate unequally many batches
            with self.rendezvous.lock:
                self._sync()

    def say(self, call: str) -> None:
        """Note a communication that is traced: replicas of one process compare them before they launch it."""
        if self.rendezvous is not None:
            self.calls += [*self._reads, call]
            self._reads = []

    def before_read(self, line: str) -> None:
        """Launch what was traced, before a value of it is asked for at `line`, in the middle of a step."""
        if self.rendezvous is not None:
            self.sync()
            self._reads = [f"read a value at {line}"]  # which cuts the graph: where replicas differ in it, they differ

    def all_reduce(self, kind: str, tensors: list[Tensor], scale: float) -> list[Tensor]:
        """Reduce fresh `tensors` in place over the replicas, multiply by `scale`, and return them."""
        if tensors:
            self.xm.all_reduce(kind, tensors, scale=scale)
        return tensors

    def to_cpu(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return copies on the CPU, in one transfer; what was only traced is computed first."""
        on_device = [t.detach() for t in tensors if t.device.type == "xla"]
        read = iter(self._private._xla_get_cpu_tensors(on_device) if on_device else ())
        return [next(read) if t.device.type == "xla" else t.detach() for t in tensors]

    def to_device(self, tensors: Sequence[Tensor], shardings: Sequence[Any] | None = None) -> list[Tensor]:
        """Return copies on the device, in one transfer that goes on in the background.

        Args:
            tensors: on the CPU, any shapes and dtypes.
            shardings: one result of `sharding` per tensor, or None without a mesh.
        """
        if not tensors:
            return []
        whole = [t.detach().contiguous() for t in tensors]
        devices = [str(self.device)] * len(whole)
        specs = None if shardings is None else [s.xla_spec(t) for s, t in zip(shardings, whole, strict=True)]
        moved: list[Tensor] = self._private._xla_tensors_from_aten(whole, devices, specs)
        return moved

    def spread(self, tensors: Sequence[Tensor], shardings: Sequence[Any]) -> list[Tensor]:
        """Return copies on the device, each split as told; unlike `to_device` along some axes of a mesh only."""
        import torch_xla.distributed.spmd as spmd

        moved = [t.detach().to(self.device) for t in tensors]
        for tensor, sharding in zip(moved, shardings, strict=True):
            spmd.mark_sharding(tensor, sharding.mesh, sharding.partition_spec)
        return moved

    def adam(self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any], rate: float) -> None:
        """Step `parameter`, which is fp32, and its `state` in place, by Adam as `group` has it but at `rate`."""
        if self._never is None:
            (self._never,) = self.to_device([torch.zeros(())])
        largest = state.get("max_exp_avg_sq", state["exp_avg_sq"])  # without amsgrad it is neither read nor written
        self._private._xla_adam_optimizer_step_(
            self._never,  # what would make it skip
            state["step"],
            parameter,
            parameter.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            largest,
            *group["betas"],
            rate,
            group["weight_decay"],
            group["eps"],
            group["amsgrad"],
            group["maximize"],
            group["decoupled_weight_decay"],
        )

    # ---------------------------------------------------------------- counters and random numbers

    def compiles(self) -> int:
        """Return the number of graphs compiled in this process, 0 where threads that share it would see each other."""
        if self.rendezvous is not None:
            return 0
        return int(self._metrics.counter_value("UncachedCompile") or 0)

    def cache_counts(self) -> dict[str, int]:
        """Return hits and misses of the persistent cache, and entries that could not be read."""
        names = ("Hit", "Miss", "DeserializeFailure")
        return {name: int(self._metrics.counter_value(f"PersistentCache{name}") or 0) for name in names}

    @staticmethod
    def counts() -> Counts:
        """Return what was counted so far, after waiting for the device: an execution counts when it ends."""
        import torch_xla.core.xla_model as xm
        import torch_xla.debug.metrics as metrics

        xm.wait_device_ops()
        executions = [metrics.metric_data(name) for name in ("ExecuteTime", "ExecuteReplicatedTime")]
        compiles = int(metrics.counter_value("UncachedCompile") or 0)
        return Counts(compiles, sum(data[0] for data in executions if data), Runtime.reads())

    @staticmethod
    def reads() -> int:
        """Return how often the host has read from the device."""
        import torch_xla.debug.metrics as metrics

        data = metrics.metric_data("TransferFromDeviceTime")
        return int(data[0]) if data else 0

    @staticmethod
    def fallbacks() -> dict[str, int]:
        """Return how often operations have run on the host, as XLA lacks them; questions for numbers are no such."""
        import torch_xla.debug.metrics as metrics

        names = [name for name in metrics.counter_names() if name.startswith("aten::")]
        return {name: int(metrics.counter_value(name)) for name in names if name != "aten::_local_scalar_dense"}

    @staticmethod
    def in_use() -> bool:
        """Whether this process has started the XLA runtime."""
        private = getattr(sys.modules.get("torch_xla"), "_XLAC", None)
        return private is not None and bool(private._xla_runtime_is_initialized())

    def name_lines(self, on: bool) -> None:
        """Let graphs remember the Python lines they come from; tracing takes half as long again."""
        if bool(self._private._get_ir_debug()) != on:
            self._private._set_ir_debug(on)

    def graph_text(self, tensors: list[Tensor]) -> list[str]:
        """Return the traced graph of `tensors`, a line per operation, without running numbers."""
        text: str = self._private._get_xla_tensors_text(tensors)
        return [re.sub(r"%\d+|scope=\S+", "%", line) for line in text.splitlines()]

    # ---------------------------------------------------------------- meshes

    def mesh(self, shape: tuple[int, ...], names: tuple[str, ...]) -> Any:
        """Return all devices as a mesh."""
        import torch_xla.distributed.spmd as spmd

        return spmd.Mesh(list(range(self.xr.global_runtime_device_count())), shape, names)

    def sharding(self, mesh: Any, split: tuple[Any, ...], part_of_global: bool = False) -> Any:
        """Return how a tensor is laid out: an axis, several or None for each dimension.

        Args:
            mesh: from `mesh`.
            split: one entry per dimension.
            part_of_global: on several hosts, each one holds its own part of the whole tensor.
        """
        import torch_xla.distributed.spmd as spmd

        several = part_of_global and self.xr.process_count() > 1
        return spmd.ShardingSpec(mesh, split, minibatch=several)

    def seed(self, seed: int) -> None:
        """Set the state of the device's random generator."""
        self.xm.set_rng_state(seed, str(self.device))

    def rng_state(self) -> int:
        """Return the state of the device's random generator."""
        return int(self.xm.get_rng_state(str(self.device)))
