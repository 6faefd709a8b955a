"""The ``tpu`` backend, also called ``xla``: PyTorch/XLA, one graph per training step.

Nothing here imports torch_xla before a run starts; `xla.runtime.Runtime` does.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.optim import LBFGS

from xtrain.checkpoint import named
from xtrain.checks import check_switch
from xtrain.collectives import Collectives
from xtrain.contract import Backend, Capabilities, OptimizerHandle, Phase
from xtrain.errors import ConfigurationError, explain
from xtrain.memory import Memory, memory_of
from xtrain.on_cpu import OnCPU
from xtrain.tensors import map_tensors, tensors_in

from . import watch as watch
from .batches import LAST_BATCH, TrainingBatches, row_count, signature
from .guard import RecompileGuard
from .lbfgs import HostLBFGS
from .mesh import Mesh, check_axes
from .move import move_module, move_optimizer
from .rendezvous import Rendezvous
from .replicas import Replicas
from .runtime import Runtime
from .steps import RatesInUse, Step

logger = logging.getLogger("xtrain")

_REHEARSE = "to rehearse on the CPU with the real compiler: PJRT_DEVICE=CPU python script.py"
_REPLICAS = {"PJRT_CPU_ASYNC_CLIENT": "0", "XLA_THREAD_POOL_SIZE": "8"}  # or replicas on the CPU wait for ever


@final
class XLA(Backend):
    """Trains on TPUs, or rehearses that on the CPU with ``PJRT_DEVICE=CPU``.

    Several devices work together as one mesh (`mesh`, or ``Trainer(devices=...)``), or as replicas that
    ``torch_xla.launch`` or ``accelerate launch --tpu`` started.

    Args:
        mesh: sizes of the axes ``"data"`` and ``"fsdp"``. Batches are split by rows over both, parameters
            and optimizer state over ``"fsdp"``.
        last_batch: what becomes of a smaller last training batch. ``"compile"`` makes one more graph for
            it, ``"drop"`` leaves it out, ``"pad"`` repeats its first row and adds a mask to every batch:
            ``batch["mask"]`` to a dict, one more item to a tuple or list.
        strict: raise `RecompileError` when a graph is compiled again after the warm-up, with the line
            that did it. Steps take about half as long again.
        compile_cache: a folder for compiled graphs, True for one below ``~/.cache``, False for none.
            Default: True on a TPU, False in a rehearsal, whose runtime cannot read them back.

    Raises:
        ConfigurationError: for a mesh or a `last_batch` that means nothing.
    """

    name = "tpu"
    capabilities = Capabilities(
        precisions=frozenset({"32-true", "bf16-mixed", "bf16-true"}),
        multi_process=True,
        inference_mode=False,  # its tensors cannot be traced
    )
    on_cpu = OnCPU({"PJRT_DEVICE": "CPU"}, told_by="XT-GRAPH-05")
    first_step = "compiling the first graph, about a minute"

    _runtime: Runtime
    _guard: RecompileGuard
    _syncs: watch.HostSyncs
    _mesh: Mesh | None = None
    _module: nn.Module | None = None

    def __init__(
        self,
        mesh: Mapping[str, int] | None = None,
        last_batch: Literal["compile", "drop", "pad"] = "compile",
        strict: bool = False,
        compile_cache: bool | str | os.PathLike[str] | None = None,
    ) -> None:
        if last_batch not in LAST_BATCH:
            fix = "backend_options={'last_batch': 'drop'}"
            raise ConfigurationError(explain(f"last_batch out of {', '.join(LAST_BATCH)}", repr(last_batch), fix))
        self.axes = check_axes(mesh)
        self.last_batch, self.compile_cache = last_batch, compile_cache
        self.strict = check_switch("strict", strict, "XLA")
        self._steps: dict[int, Step | HostLBFGS] = {}
        self._optimizers: Sequence[OptimizerHandle] = ()
        self._hooks: list[Any] = []
        self._warned: set[str] = set()

    # ---------------------------------------------------------------- start-up

    @classmethod
    def available(cls) -> str | None:
        if util.find_spec("torch_xla") is None:
            return "torch_xla is not installed; pip install 'xtrain-torch[tpu]'"
        ours, theirs = torch.__version__.split("+")[0], metadata.version("torch_xla").split("+")[0]
        if ours.split(".")[:2] != theirs.split(".")[:2]:
            pair = f"pip install 'torch=={theirs}' 'torch_xla=={theirs}'"
            return f"torch {ours} and torch_xla {theirs} do not load together; {pair}"
        if "PJRT_DEVICE" not in os.environ and not _has_tpu():
            return f"there is no TPU; {_REHEARSE}"
        return None

    def launch(self) -> None:
        axes = self._wanted_mesh()
        folder = self._cache_folder()
        self._runtime = runtime = Runtime(spmd=axes is not None, cache=folder)
        if folder is not None and not runtime.cached:
            self._warn_once(
                f"No graph is kept in {folder}: others were compiled before, or are kept in another folder."
            )
        self.device = runtime.device
        self._mesh = None if axes is None else Mesh(axes, runtime)
        self.collectives = self._join_replicas() if runtime.replicas() > 1 else Collectives()
        self._guard = RecompileGuard(runtime, self.strict, self._warn_once)
        self._syncs = watch.HostSyncs(self._warn_once, runtime.before_read)
        watch.install()
        # The device has a generator of its own. A copy of torch's gives the seed, so torch.manual_seed
        # decides both, and the numbers that shuffle the data stay those of the other backends. Replicas
        # make noise of their own for their own rows.
        generator = torch.Generator()
        generator.set_state(torch.get_rng_state())
        runtime.seed(int(torch.randint(2**31, (), generator=generator)) + self.collectives.rank)

    def _wanted_mesh(self) -> dict[str, int] | None:
        replicas = Runtime.replicas()
        if replicas > 1 and (self.axes or (self.devices or replicas) != replicas):
            received = f"mesh={self.axes}, devices={self.devices}"
            fix = "leave both out, or start the script as one process: python script.py"
            raise ConfigurationError(explain(f"the {replicas} replicas that were launched", received, fix))
        if self.axes is not None or replicas > 1 or (self.devices or 1) == 1:
            return self.axes
        return {"data": self.devices or 1}

    def _join_replicas(self) -> Replicas:
        if self._runtime.rehearsal:
            missing = [f"{k}={v}" for k, v in _REPLICAS.items() if k not in os.environ]
            if missing:
                expected = "the settings that replicas on the CPU need"
                raise ConfigurationError(
                    explain(expected, f"none of {', '.join(missing)}", " ".join([*missing, "..."]))
                )
            self._runtime.rendezvous = Rendezvous.of_process(self._runtime.replicas())
        return Replicas(self._runtime)

    def _cache_folder(self) -> Path | None:
        rehearsal = os.environ.get("PJRT_DEVICE") == "CPU"
        wanted = not rehearsal if self.compile_cache is None else self.compile_cache
        if wanted is False:
            return None
        folder = Path.home() / ".cache" / "xtrain" / "xla" if wanted is True else Path(wanted)
        return folder / f"rank{os.environ.get('PJRT_LOCAL_PROCESS_RANK', '0')}"

    def setup_module(self, module: nn.Module) -> None:
        self._module = module
        layout = None if self._mesh is None else self._mesh.of_state
        move_module(module, self._runtime, self.precision.parameter_dtype, layout)
        if isinstance(self.collectives, Replicas):
            self.collectives.share_module(module)

    def setup_optimizers(self, module: nn.Module, optimizers: Sequence[OptimizerHandle]) -> None:
        self._optimizers = optimizers
        rates_in_use: RatesInUse = {}
        layout = None if self._mesh is None else self._mesh.of_state
        for optimizer in optimizers:
            raw = optimizer.optimizer
            if isinstance(raw, LBFGS):
                self._warn_once("LBFGS computes on the CPU: each evaluation of its closure reads the gradients back.")
                average = self.collectives.all_reduce
                self._steps[id(optimizer)] = HostLBFGS(raw, self._runtime, self._runtime.sync, average)
                continue
            step = Step(raw, self._runtime, rates_in_use)
            self._steps[id(optimizer)] = step

            def move(raw: torch.optim.Optimizer, counts: bool = step.counts_on_device) -> None:
                move_optimizer(raw, self._runtime, counts, layout)

            move(raw)
            self._hooks.append(raw.register_load_state_dict_post_hook(move))

    # ---------------------------------------------------------------- the life of a gradient

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        if isinstance(self.collectives, Replicas):  # what waits from before may differ: it is no part of this graph
            self._runtime.sync()
        self._guard.begin(o for o in self._optimizers if o.phase in (Phase.ACCUMULATED, Phase.FINALIZED))
        with self._syncs.watching(), super().forward_context():
            yield

    def zero_grad(self, optimizer: OptimizerHandle, set_to_none: bool = True) -> None:
        self._guard.verb("zero_grad", optimizer)
        optimizer.optimizer.zero_grad(set_to_none)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self._guard.verb("backward", None)
        self._guard.loss(loss)
        with self.precision.backward_context(self.device.type):
            loss.backward(*args, **kwargs)

    def finalize_gradients(self, optimizer: OptimizerHandle) -> None:
        if isinstance(self.collectives, Replicas):
            self.collectives.average_gradients(optimizer.parameters, optimizer)

    def clip_gradients(self, optimizer: OptimizerHandle, value: float, algorithm: Literal["norm", "value"]) -> Tensor:
        self._guard.verb("clip", optimizer)
        grads = [p.grad for p in optimizer.parameters if p.grad is not None]
        norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
        factor = torch.clamp(value / (norm + 1e-6), max=1.0)
        with torch.no_grad():
            for grad in grads:
                if algorithm == "norm":
                    grad.mul_(factor)
                else:
                    grad.clamp_(-value, value)
        return norm

    def step(
        self, optimizer: OptimizerHandle, closure: Callable[[], Any] | None = None, **kwargs: Any
    ) -> tuple[Any, bool]:
        self._guard.verb("step", optimizer)
        with self.precision.suspended(self.device.type):
            return self._steps[id(optimizer)](closure, **kwargs), True

    def step_boundary(self) -> None:
        graph = None if self._module is None else self._guard.launching(self._module.parameters())
        self._runtime.sync()
        self._guard.launched(graph)

    def unseen_gradient(self) -> str | None:
        return "the average over the replicas" if self.collectives.world_size > 1 else None

    # ---------------------------------------------------------------- data and state

    def training_batches(self, loader: Iterable[Any]) -> Iterable[Any]:
        return TrainingBatches(loader, self.last_batch, self._smaller_batch)

    def _smaller_batch(self, batch: Any, full: int) -> None:
        if self.last_batch == "drop":
            self._warn_once(
                f"A last batch with {row_count(batch)} rows instead of {full} is left out (last_batch='drop')."
            )
            return
        self._guard.expect(signature(batch))
        self._warn_once(
            f"A last batch has {row_count(batch)} rows instead of {full}: one more graph is compiled for it. "
            "backend_options={'last_batch': 'drop'} or 'pad' avoids that."
        )

    def batch_to_device(self, batch: Any) -> Any:
        self._guard.batch(signature(batch))
        specs = None if self._mesh is None or batch is None else self._mesh.of_batch(batch)
        tensors = list(tensors_in(batch, objects=False))
        here = [i for i, t in enumerate(tensors) if t.device.type == "cpu"]
        dtype = self.precision.parameter_dtype
        cast = [t.to(dtype) if dtype is not None and t.is_floating_point() else t for t in (tensors[i] for i in here)]
        moved = iter(self._runtime.to_device(cast, None if specs is None else [specs[i] for i in here]))
        return map_tensors(lambda t: next(moved) if t.device.type == "cpu" else self._move(t), batch, self._move_object)

    def memory(self, module: nn.Module, optimizers: Sequence[OptimizerHandle]) -> Memory:
        return memory_of(module, optimizers, Tensor.numel if self._mesh is None else self._mesh.held)

    def read_scalars(self, values: Sequence[Tensor]) -> list[float]:
        return [float(value) for value in self._runtime.to_cpu(values)]

    def to_cpu(self, data: Any) -> Any:
        moved = iter(self._runtime.to_cpu(list(tensors_in(data))))
        return map_tensors(lambda _: next(moved).clone(), data)

    def load_training_state(
        self, module: nn.Module, optimizers: Sequence[OptimizerHandle], state: Mapping[str, Any]
    ) -> None:
        named.load_training_state(module, optimizers, state, lambda value, *_: value.clone())
        for optimizer in optimizers:
            step = self._steps[id(optimizer)]
            if isinstance(step, Step):  # all of its state in one transfer
                layout = None if self._mesh is None else self._mesh.of_state
                move_optimizer(optimizer.optimizer, self._runtime, step.counts_on_device, layout)

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self._runtime.rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "rng" in state:
            self._runtime.seed(state["rng"])

    def teardown(self) -> None:
        watch.uninstall()
        self._runtime.name_lines(False)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._steps.clear()
        self._optimizers = ()
        error = sys.exc_info()[1]
        if self._runtime.rendezvous is not None and error is not None:
            self._runtime.rendezvous.leave(self.collectives.rank, error, bool(self._runtime.calls))
        if self._runtime.cached:
            logger.info("compile cache: %s", self._runtime.cache_counts())

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning(text)


def _has_tpu() -> bool:
    """Return whether the kernel shows a TPU: as an accelerator, or bound to vfio on the newer ones."""
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
