"""What is checked, and where: the one table behind `ci/run.py`, `.ci/run` and the hosted matrix.

A new backend is one more `Conformance` with its ``tests/backends/test_<name>.py``.
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
        arguments: options of that pytest run.
        commands: checks that are no tests, each with its arguments.
        variables: environment variables on top of `VARIABLES`.
        usual: minutes it takes on two free cores, for the announcement.
        minutes: the leg is stopped, and has failed, after this time.
        needs: a key of `HARDWARE`; where that is missing, the leg is not part of everything.
    """

    environment: str
    tests: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    commands: tuple[tuple[str, ...], ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    usual: float = 1
    minutes: float = 20
    needs: str = ""


@dataclass(frozen=True)
class Hardware:
    """What some machines have.

    Attributes:
        devices: files, one of which is there then.
        untested: what cannot be tested without it.
    """

    devices: tuple[str, ...]
    untested: str


# Small models on few cores: several threads per process only get in each other's way.
VARIABLES = {"OMP_NUM_THREADS": "1"}

HARDWARE = {
    "GPU": Hardware(
        ("/dev/nvidia0", "/dev/dxg", "/dev/kfd"),
        "CUDA's kernels, nccl and speed; the logic of the cuda backend runs on the CPU "
        "(elsewhere: python3 ci/run.py --leg gpu)",
    ),
    "TPU": Hardware(
        ("/dev/accel0", "/dev/vfio/0"),
        "a TPU's speed, memory and kept graphs; the compiler is the real one, for the CPU",
    ),
}

ENVIRONMENTS = {
    "light": Environment(("test", "dev", "docs"), ("torch==2.13.0",)),
    "full": Environment(("test",), ("torch==2.9.1", "torch_xla==2.9.0", "deepspeed==0.19.8", "accelerate==1.15.0")),
    # Packages of services and of notebooks, which bring much with them; offline.
    "services": Environment(
        ("test", "wandb", "mlflow", "aim"), ("torch==2.13.0", "ipykernel>=6.29", "ipywidgets>=8.1", "nbclient>=0.10")
    ),
}


@dataclass(frozen=True)
class Conformance:
    """A row of the matrix: the common suite on one backend, one leg for each precision.

    Attributes:
        environment: a key of `ENVIRONMENTS`.
        backend: first part of the legs' names.
        processes: how many train together.
        tests: the file with the subclass of the suite.
        precisions: all that the file tests.
        variables: environment variables on top of `VARIABLES`.
        usual: minutes that each leg takes on two free cores.
    """

    environment: str
    backend: str
    processes: int
    tests: str
    precisions: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    usual: float = 0.3

    def legs(self) -> dict[str, Leg]:
        """Return the legs by name: backend, precision, processes."""
        return {
            f"{self.backend}-{precision}-{self.processes}p": Leg(
                self.environment,
                tests=(self.tests,),
                arguments=(f"--precision={precision}",),
                variables=self.variables,
                usual=self.usual,
            )
            for precision in self.precisions
        }


_MIXED = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
_XLA = {"PJRT_DEVICE": "CPU"}  # real torch_xla, rehearsed on the CPU
_DEEPSPEED = {"DS_ACCELERATOR": "cpu"}  # real DeepSpeed, on gloo

CONFORMANCE = (
    Conformance("light", "cpu", 1, "tests/backends/test_cpu.py", _MIXED),
    Conformance("light", "cpu", 2, "tests/backends/test_cpu_two_processes.py", _MIXED),
    Conformance("light", "cuda-logic-on-cpu", 1, "tests/backends/test_cuda.py", (*_MIXED, "16-true")),
    Conformance("light", "accelerator-logic-on-cpu", 1, "tests/backends/test_accelerator.py", (*_MIXED, "16-true")),
    Conformance("light", "fsdp", 1, "tests/backends/test_fsdp.py", _MIXED),
    Conformance("light", "fsdp", 2, "tests/backends/test_fsdp_two_processes.py", _MIXED),
    Conformance("full", "tpu", 1, "tests/backends/test_tpu.py", ("32-true", "bf16-mixed", "bf16-true"), _XLA, usual=2),
    Conformance("full", "deepspeed", 1, "tests/backends/test_deepspeed.py", _MIXED, _DEEPSPEED),
)

_CORE = ("tests/test_*.py",)
_RECIPES, _SHORT = ("tests/recipes/test_*.py",), ("tests/recipes/test_short_form.py",)

LEGS = {
    "lint": Leg(
        "light",
        commands=(("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",), ("codespell",)),
    ),
    "core": Leg("light", tests=_CORE, usual=2),
    # The oldest torch, beside every heavy package: nothing of them may be picked up unasked.
    "core-oldest-torch": Leg("full", tests=(*_CORE, "tests/backends/test_cpu.py"), usual=3),
    **{name: leg for row in CONFORMANCE for name, leg in row.legs().items()},
    # Recorded and replayed steps; the compiler itself in a few.
    "compiled": Leg("light", tests=("tests/compiled/test_*.py",), variables={"TORCHINDUCTOR_COMPILE_THREADS": "1"}),
    # Graphs and reads counted, replicas, meshes of virtual devices.
    "tpu-graphs-replicas-meshes": Leg("full", tests=("tests/tpu/test_*.py",), variables=_XLA, usual=4),
    # Every ZeRO stage, on one process and on two.
    "deepspeed-stages-1p-2p": Leg("full", tests=("tests/zero/test_*.py",), variables=_DEEPSPEED, usual=3),
    # The device backend of the page "Writing a backend".
    "eager-base": Leg("light", tests=("tests/backends/test_eager_base.py",)),
    # Two precisions stand for all here: in one nothing is cast, in the other a loss is scaled, too.
    **{
        f"fsdp-backward-{precision}-1p-2p": Leg(
            "light", tests=("tests/backends/test_fsdp_backward*.py",), arguments=(f"--precision={precision}",)
        )
        for precision in ("32-true", "16-mixed")
    },
    "fsdp-oldest-torch": Leg(
        "full", tests=("tests/backends/test_fsdp_two_processes.py",), arguments=("--precision=32-true",)
    ),
    # Recipes of several optimizers in shards on two and four processes, both modes.
    "fsdp-recipes-2p-4p": Leg("light", tests=("tests/fsdp/test_*.py",)),
    # A training that moves between backends, numbers of processes and precisions; kills and signals.
    "resume": Leg("full", tests=("tests/resume/test_*.py",), usual=4),
    # `xtrain check`: a gallery of modules with planted faults; what user code does to a child process.
    "rehearsal": Leg("full", tests=("tests/rehearsal/test_*.py",), usual=4),
    # The recipes of examples/ in a short form, and a few steps of each beside a loop by hand.
    "recipes-on-cpu": Leg("light", tests=_RECIPES),
    "recipes-on-tpu": Leg("full", tests=_SHORT, variables={**_XLA, "XTRAIN_RECIPES": "tpu"}, usual=3),
    "recipes-on-deepspeed": Leg("full", tests=_SHORT, variables={**_DEEPSPEED, "XTRAIN_RECIPES": "deepspeed"}),
    # Real processes under every launcher; every command of the page on launching.
    "launch": Leg("full", tests=("tests/launch/test_*.py",), usual=5),
    "loggers": Leg("services", tests=("tests/services/test_*.py",)),
    "wheel": Leg("light", tests=("tests/packaging/test_*.py",), usual=3),
    # Links, anchors, references of docstrings: whatever mkdocs warns about is an error.
    "docs": Leg(
        "light",
        commands=(("mkdocs", "build", "--strict"),),
        variables={"NO_MKDOCS_2_WARNING": "true"},  # a page of colours about another project
    ),
    "gpu": Leg("light", tests=("tests/backends/test_cuda.py",), arguments=("-m", "cuda"), needs="GPU"),
}
