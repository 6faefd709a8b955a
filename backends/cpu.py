"""The ``cpu`` backend: plain PyTorch."""

from __future__ import annotations

from typing import final

import torch

from xtrain.contract import Capabilities

from .eager.backend import EagerBackend


@final
class CPU(EagerBackend):
    """Trains on the CPU, in fp32, under autocast (fp16 with the loss scaler, bf16) or in bf16.

    With several processes (gloo) gradients are averaged; see `EagerBackend` for the options.
    """

    name = "cpu"
    capabilities = Capabilities(
        precisions=frozenset({"32-true", "16-mixed", "bf16-mixed", "bf16-true"}),
        asynchronous=False,
        multi_process=True,
        fused_optimizers=True,
        compiled_steps=True,
    )

    @classmethod
    def available(cls) -> str | None:
        return None

    def launch(self) -> None:
        self.device = torch.device("cpu")
        self.join("gloo")
