"""How a backend spreads a training over devices: what of parameters, state and gradients one of them holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Parts:
    """Bytes of a training on one device that holds all of it, at its peak.

    Attributes:
        parameters: and buffers.
        state: of the optimizers.
        gradients: that are there at the peak.
        activations: what autograd keeps, the batch, and what operations need while they run.
        largest: parameters of the largest layer.
    """

    parameters: int
    state: int
    gradients: int
    activations: int
    largest: int = 0

    @property
    def peak(self) -> int:
        """All of it."""
        return self.parameters + self.state + self.gradients + self.activations


@dataclass(frozen=True)
class Layout:
    """What is divided by the number of devices. A backend class has its own as `layouts`; without, all are replicas.

    Attributes:
        options: the arguments of the Trainer that choose it.
        parameters: whether they are divided; the largest layer is whole while it computes.
        state: whether the state of optimizers is divided.
        gradients: whether they are divided at their peak.
        masters: whether there is a divided copy of the parameters in fp32, which is stepped.

    Example:
        >>> parts = Parts(parameters=400, state=800, gradients=400, activations=100)
        >>> Layout().held(parts, devices=4)
        1700
        >>> Layout("backend_options={'stage': 2}", state=True, masters=True).held(parts, devices=4)
        1200
    """

    options: str = ""
    parameters: bool = False
    state: bool = False
    gradients: bool = False
    masters: bool = False

    def held(self, parts: Parts, devices: int) -> int:
        """Return the bytes that each of `devices` devices holds at the peak."""
        share = [devices if divided else 1 for divided in (self.parameters, self.state, self.gradients)]
        held = parts.parameters / share[0] + parts.state / share[1] + parts.gradients / share[2] + parts.activations
        if self.parameters and devices > 1:
            held += parts.largest
        if self.masters:
            held += parts.parameters / devices
        return round(held)
