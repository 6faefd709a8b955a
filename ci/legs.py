"""What is checked, and where: the one table behind `ci/run.py`, `.ci/run` and the hosted matrix.

A new backend is one more `Leg` with its ``tests/backends/test_<name>.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Environment:
    """A virtual environment: the project, editable, with some extras and exact versions.

    Attributes:
        extras: extras of the project, as in pyproject.toml.
        pins: requirements that fix what the extras leave open.
    """

    extras: tuple[str, ...]
    pins: tuple[str, ...]


@dataclass(frozen=True)
class Leg:
    """One line of the summary.

    Attributes:
        environment: a key of `ENVIRONMENTS`.
        tests: test files or patterns, relative to the root, given to one pytest run.
        commands: checks that are no tests, each with its arguments.
        variables: environment variables on top of `VARIABLES`.
        minutes: the leg is stopped, and has failed, after this time.
    """

    environment: str
    tests: tuple[str, ...] = ()
    commands: tuple[tuple[str, ...], ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    minutes: float = 20


# Small models on few cores: several threads per process only get in each other's way.
VARIABLES = {"OMP_NUM_THREADS": "1"}

ENVIRONMENTS = {
    "light": Environment(("test", "dev"), ("torch==2.13.0",)),
    "full": Environment(("test",), ("torch==2.9.1", "torch_xla==2.9.0", "deepspeed==0.19.8", "accelerate==1.15.0")),
}

_CORE = ("tests/test_*.py", "tests/backends/test_cpu.py")

LEGS = {
    "lint": Leg(
        "light",
        commands=(("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",), ("codespell",)),
    ),
    "cpu": Leg("light", tests=_CORE),
    "two-processes": Leg("light", tests=("tests/backends/test_cpu_two_processes.py",)),
    # Real processes under every launcher; every command of the page on launching.
    "launch": Leg("full", tests=("tests/launch/test_*.py",), minutes=30),
    "cuda-logic-on-cpu": Leg("light", tests=("tests/backends/test_cuda.py",)),
    "wheel": Leg("light", tests=("tests/packaging/test_*.py",)),
    # The oldest torch, beside every heavy package: nothing of them may be picked up unasked.
    "oldest-torch": Leg("full", tests=_CORE),
    # Real torch_xla on the CPU: one device for the common suite, then replicas and meshes of virtual ones.
    "tpu": Leg(
        "full",
        tests=("tests/backends/test_tpu.py", "tests/tpu/test_*.py"),
        variables={"PJRT_DEVICE": "CPU"},
        minutes=45,
    ),
    # On the CPU with gloo: one process for the common suite, two for every ZeRO stage.
    "deepspeed": Leg(
        "full",
        tests=("tests/backends/test_deepspeed.py", "tests/zero/test_*.py"),
        variables={"DS_ACCELERATOR": "cpu"},
    ),
}
