"""The ``cuda`` backend: PyTorch on an NVIDIA GPU, with AMP."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from xtrain.checks import check_switch
from xtrain.contract import Capabilities, Rule, Situation
from xtrain.errors import ConfigurationError, explain
from xtrain.launch.join import current_launch

from .eager.backend import EagerBackend


def _bf16_missing(situation: Situation) -> str | None:
    if not situation.precision.name.startswith("bf16") or torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    return f"{situation.precision.name} on {torch.cuda.get_device_name()}"


@final
class CUDA(EagerBackend):
    """Trains on the GPU numbered LOCAL_RANK (0 without a launcher); several processes talk through nccl.

    Batches are pinned and copied without blocking; fused and foreach optimizers work as they are,
    since gradients are unscaled before they are clipped and stepped.

    Args:
        pin_memory: copy batches through page-locked memory, so that the copy overlaps with compute.
        broadcast_start: see `EagerBackend`.
        timeout: see `EagerBackend`.
    """

    name = "cuda"
    capabilities = Capabilities(
        precisions=frozenset({"32-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true"}),
        multi_process=True,
        fused_optimizers=True,
        compiled_steps=True,
    )
    rules = (
        Rule(
            "cuda-bf16",
            "bf16 on a GPU without bf16 arithmetic (before Ampere)",
            "The GPU would emulate it, slower than fp32.",
            "Trainer(precision='16-mixed')",
            "torch.cuda.is_bf16_supported",
            _bf16_missing,
        ),
    )

    def __init__(self, pin_memory: bool = True, broadcast_start: bool = True, timeout: float = 600.0) -> None:
        super().__init__(broadcast_start, timeout)
        self.pin_memory = check_switch("pin_memory", pin_memory, "CUDA")

    @classmethod
    def available(cls) -> str | None:
        if torch.cuda.is_available():
            return None
        if torch.version.cuda is None and torch.version.hip is None:
            return (
                "this torch was built without CUDA and without ROCm, whose GPUs are this backend's, too; "
                "pip install 'xtrain-torch[cuda]' from an index with such builds"
            )
        return "no CUDA device is visible; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use backend='cpu'"

    def launch(self) -> None:
        launch, count = current_launch(), torch.cuda.device_count()
        wanted = max(launch.local_rank + 1, self.devices or 1)
        if wanted > count:
            fix = f"Trainer(devices={count}), or torchrun --nproc_per_node={count} script.py"
            raise ConfigurationError(explain(f"at most {count} processes, one per visible GPU", wanted, fix))
        self.device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(self.device)
        self.join("nccl")

    def _move(self, tensor: Tensor) -> Tensor:
        if self.pin_memory and tensor.device.type == "cpu" and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        dtype = self.precision.parameter_dtype if tensor.is_floating_point() else None
        return tensor.to(self.device, dtype, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rng": torch.cuda.get_rng_state(self.device)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if "rng" in state:
            torch.cuda.set_rng_state(state["rng"], self.device)
