"""The ``tpu`` backend, also called ``xla``: PyTorch/XLA, one graph per training step.

Nothing here imports torch_xla before a run starts; `_xla_runtime.Runtime` does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.optim import LBFGS

from xtrain.contract import Backend, Capabilities, map_tensors
from xtrain.errors import BackendUnavailableError
from xtrain.optimizer import LightningOptimizer

from ._xla_lbfgs import HostLBFGS
from ._xla_move import move_module, move_optimizer, move_state
from ._xla_runtime import Runtime
from ._xla_steps import Step, Taken

_REHEARSE = "to rehearse on the CPU with the real compiler: PJRT_DEVICE=CPU python script.py"


@final
class XLA(Backend):
    """Trains on a TPU, or rehearses that on the CPU with ``PJRT_DEVICE=CPU``."""

    name = "tpu"
    capabilities = Capabilities(
        precisions=frozenset({"32-true", "bf16-mixed", "bf16-true"}),
        inference_mode=False,  # its tensors cannot be traced
    )

    _runtime: Runtime
    _steps: dict[int, Step | HostLBFGS]
    _hooks: list[Any]

    # ---------------------------------------------------------------- start-up

    @classmethod
    def available(cls) -> str | None:
        if util.find_spec("torch_xla") is None:
            return "torch_xla is not installed; pip install 'xtrain[tpu]'"
        ours, theirs = torch.__version__.split("+")[0], metadata.version("torch_xla").split("+")[0]
        if ours.split(".")[:2] != theirs.split(".")[:2]:
            return f"torch {ours} and torch_xla {theirs} do not load together; pip install 'torch=={theirs}' 'torch_xla=={theirs}'"
        if "PJRT_DEVICE" not in os.environ and not _has_tpu():
            return f"there is no TPU; {_REHEARSE}"
        return None

    def launch(self) -> None:
        self._runtime = Runtime()
        self.device = self._runtime.device
        if self._runtime.rehearsal and os.environ.get("PJRT_DEVICE") != "CPU":
            raise BackendUnavailableError(f"Backend '{self.name}' cannot run here: torch_xla found no TPU; {_REHEARSE}")
        self._steps, self._hooks = {}, []
        # The device has a generator of its own. A copy of torch's gives the seed, so torch.manual_seed
        # decides both, and the numbers that shuffle the data stay those of the other backends.
        generator = torch.Generator()
        generator.set_state(torch.get_rng_state())
        self._runtime.seed(int(torch.randint(2**31, (), generator=generator)))

    def setup_module(self, module: nn.Module) -> None:
        move_module(module, self._runtime, self.precision.parameter_dtype)

    def setup_optimizers(self, module: nn.Module, optimizers: Sequence[LightningOptimizer]) -> None:
        taken: Taken = {}
        for optimizer in optimizers:
            raw = optimizer.optimizer
            self._steps[id(optimizer)] = self._make_step(raw, taken)
            move_optimizer(raw, self._runtime)

    def _make_step(self, raw: torch.optim.Optimizer, taken: Taken) -> Step | HostLBFGS:
        if isinstance(raw, LBFGS):
            return HostLBFGS(raw, self._runtime, self._runtime.sync, self.collectives.all_reduce)
        return Step(raw, self._runtime, taken)

    # ---------------------------------------------------------------- the life of a gradient

    def zero_grad(self, optimizer: LightningOptimizer, set_to_none: bool = True) -> None:
        optimizer.optimizer.zero_grad(set_to_none)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with self.precision.suspended(self.device.type):
            loss.backward(*args, **kwargs)

    def finalize_gradients(self, optimizer: LightningOptimizer) -> None:
        """Do nothing: one device, or one program over all devices, has whole gradients."""

    def clip_gradients(
        self, optimizer: LightningOptimizer, value: float, algorithm: Literal["norm", "value"]
    ) -> Tensor:
        grads = [p.grad for p in optimizer.parameters if p.grad is not None]
        norms = [torch.linalg.vector_norm(grad) for grad in grads]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        factor = torch.clamp(value / (norm + 1e-6), max=1.0)
        with torch.no_grad():
            for grad in grads:
                if algorithm == "norm":
                    grad.mul_(factor)
                else:
                    grad.clamp_(-value, value)
        return norm

    def step(self, optimizer: LightningOptimizer, closure: Callable[[], Any] | None = None) -> tuple[Any, bool]:
        with self.precision.suspended(self.device.type):
            return self._steps[id(optimizer)](closure), True

    def step_boundary(self) -> None:
        self._runtime.sync()

    # ---------------------------------------------------------------- data and state

    def batch_to_device(self, batch: Any) -> Any:
        waiting: list[Tensor] = []
        map_tensors(lambda t: waiting.append(t) if t.device.type == "cpu" else None, batch)
        dtype = self.precision.parameter_dtype
        cast = [t.to(dtype) if dtype is not None and t.is_floating_point() else t for t in waiting]
        moved = iter(self._runtime.to_device(cast))
        return map_tensors(lambda t: next(moved) if t.device.type == "cpu" else self._move(t), batch)

    def read_scalars(self, values: Sequence[Tensor]) -> list[float]:
        return [float(value) for value in self._runtime.to_cpu(values)]

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self._runtime.rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "rng" in state:
            self._runtime.seed(state["rng"])

    def teardown(self) -> None:
        self._steps.clear()


def _has_tpu() -> bool:
    """Return whether the kernel shows a TPU: as an accelerator, or bound to vfio on the newer ones."""
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
