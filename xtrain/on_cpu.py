"""How a backend of another device is rehearsed on the CPU, with its real engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class OnCPU:
    """What makes a backend run on a machine without its device. A backend class has its own as `on_cpu`, if it can.

    Attributes:
        variables: of the environment, set before the backend's packages are imported.
        options: of the backend.
        told_by: id of the finding by which a check of the backend tells that a step ends with an error there.

    Example:
        >>> OnCPU(options={"device": "cpu"}).variables
        {}
    """

    variables: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    told_by: str = ""
