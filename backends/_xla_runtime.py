"""What the ``tpu`` backend asks of torch_xla: one object per backend, made when a run starts.

Everything that is private to torch_xla, or differs between its releases, is called here and nowhere
else. Importing torch_xla changes a process (it patches torch and picks a device), so it happens in
`Runtime.__init__` and not at import.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xtrain.errors import BackendUnavailableError, explain


class Runtime:
    """The XLA runtime of this process, started.

    Args:
        spmd: make one virtual device of all devices. Only possible before anything ran on them.

    Attributes:
        device: the device of this process or thread.
        xm: ``torch_xla.core.xla_model``.
        xr: ``torch_xla.runtime``.

    Raises:
        BackendUnavailableError: if the process has done something that XLA cannot follow.
    """

    def __init__(self, spmd: bool = False) -> None:
        import torch_xla
        import torch_xla.core.xla_model as xm
        import torch_xla.debug.metrics as metrics
        import torch_xla.runtime as xr

        self.xm, self.xr, self._metrics = xm, xr, metrics
        self._private = torch_xla._XLAC
        self._sync = torch_xla.sync
        if spmd and not xr.is_spmd():
            if self._private._xla_get_spmd_config_is_locked():
                received = "a process that has already used the devices one by one"
                fix = "start Trainer.fit with the mesh before any other tensor is on the TPU, or in a fresh process"
                raise BackendUnavailableError(explain("a mesh before any device is used", received, fix))
            xr.use_spmd()
        self.device: torch.device = torch_xla.device()
        self._check_autograd()

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

    @property
    def rehearsal(self) -> bool:
        """Whether the devices are the CPU's (``PJRT_DEVICE=CPU``)."""
        return bool(self.xr.device_type() == "CPU")

    # ---------------------------------------------------------------- running

    def sync(self) -> None:
        """Launch everything that was traced, as one graph. Does not wait for it."""
        self._sync()

    def to_cpu(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return copies on the CPU, in one transfer; what was only traced is computed first."""
        on_device = [t.detach() for t in tensors if t.device.type == "xla"]
        read = iter(self._private._xla_get_cpu_tensors(on_device) if on_device else ())
        return [next(read) if t.device.type == "xla" else t.detach() for t in tensors]

    def to_device(self, tensors: Sequence[Tensor], shardings: Sequence[Any] | None = None) -> list[Tensor]:
        """Return copies on the device, in one transfer that goes on in the background.

        Args:
            tensors: on the CPU, any shapes and dtypes.
            shardings: one spec per tensor (see `_xla_mesh`), or None without a mesh.
        """
        if not tensors:
            return []
        whole = [t.detach().contiguous() for t in tensors]
        devices = [str(self.device)] * len(whole)
        moved: list[Tensor] = self._private._xla_tensors_from_aten(whole, devices, shardings)
        return moved

    # ---------------------------------------------------------------- counters and random numbers

    def compiles(self) -> int:
        """Return the number of graphs compiled in this process."""
        return int(self._metrics.counter_value("UncachedCompile") or 0)

    def seed(self, seed: int) -> None:
        """Set the state of the device's random generator."""
        self.xm.set_rng_state(seed, str(self.device))

    def rng_state(self) -> int:
        """Return the state of the device's random generator."""
        return int(self.xm.get_rng_state(str(self.device)))
