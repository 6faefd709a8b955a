"""The ``accelerator`` backend: whatever `torch.accelerator` reports, such as XPU, MPS, NPU, HPU or TorchTPU."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import distributed as dist

from xtrain.contract import Capabilities, Rule, Situation
from xtrain.errors import ConfigurationError, explain
from xtrain.launch.join import current_launch

from .eager.backend import EagerBackend


def _no_autocast(situation: Situation) -> str | None:
    kind = situation.backend.device.type
    mixed = situation.precision.autocast_dtype is not None
    return f"{situation.precision.name} on {kind}" if mixed and not torch.amp.is_autocast_available(kind) else None


def _no_unscaling(situation: Situation) -> str | None:
    if not situation.precision.loss_scaling:
        return None
    device = situation.backend.device
    try:
        one = torch.ones((), device=device)
        torch._amp_foreach_non_finite_check_and_unscale_([torch.ones(1, device=device)], one.clone(), one)
    except (NotImplementedError, RuntimeError) as error:
        return f"{situation.precision.name} on {device.type}, which says: {str(error).splitlines()[0]}"
    return None


@final
class Accelerator(EagerBackend):
    """Trains on the device of torch's build, numbered LOCAL_RANK, with PyTorch alone.

    Several processes talk through the library that the device brings along; see `EagerBackend` for the options.
    """

    name = "accelerator"
    capabilities = Capabilities(
        precisions=frozenset({"32-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true"}), multi_process=True
    )
    rules = (
        Rule(
            "accelerator-autocast",
            "a mixed precision on a device for which torch has no autocast",
            "The forward would run in fp32, as if nothing had been asked for.",
            "Trainer(precision='bf16-true') or '32-true'",
            "torch.amp.is_autocast_available",
            _no_autocast,
        ),
        Rule(
            "accelerator-scaling",
            "16-mixed on a device that cannot look for overflows in gradients",
            "The loss scale could never be taken off safely.",
            "Trainer(precision='bf16-mixed')",
            "torch.amp.GradScaler",
            _no_unscaling,
        ),
    )

    @classmethod
    def available(cls) -> str | None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if found is None:
            return "torch.accelerator sees no device; install the torch of its vendor, or use backend='cpu'"
        if found.type == "cuda":
            return "it is a GPU of NVIDIA or, with ROCm, of AMD; use backend='cuda', which knows more about it"
        return None

    def launch(self) -> None:
        launch, count = current_launch(), self._count()
        wanted = max(launch.local_rank + 1, self.devices or 1)
        if wanted > count:
            fix = f"Trainer(devices={count}), or torchrun --nproc_per_node={count} script.py"
            raise ConfigurationError(explain(f"at most {count} processes, one per device", wanted, fix))
        self.device = self._start(launch.local_rank)
        self.join(dist.get_default_backend_for_device(self.device.type))

    def _count(self) -> int:
        return torch.accelerator.device_count()

    def _start(self, number: int) -> torch.device:
        """Make device `number` the one of this process, and return it."""
        found = torch.accelerator.current_accelerator()
        assert found is not None
        torch.accelerator.set_device_index(number)
        return torch.device(found.type, number)

    def state_dict(self) -> dict[str, Any]:
        random = getattr(torch.get_device_module(self.device), "get_rng_state", None)
        return super().state_dict() | ({} if random is None else {"rng": random(self.device).cpu()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if "rng" in state:
            torch.get_device_module(self.device).set_rng_state(state["rng"], self.device)
