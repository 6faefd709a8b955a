"""What started this process? Read from the environment alone, so that every launcher can be tested from a table.

A launcher's word is never overridden: what a script says explicitly must agree with it, or is an error
that names both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from xtrain.compat.backends import REPLICAS, WISHES
from xtrain.errors import ConfigurationError, explain
from xtrain.launch.clusters import as_torchrun

LAUNCH_ID = "XTRAIN_LAUNCH_ID"
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_USES = ("CPU", "DEEPSPEED", "FSDP", "MEGATRON_LM")
_ACCELERATE = ("ACCELERATE_MIXED_PRECISION", *(f"ACCELERATE_USE_{use}" for use in _USES))
_PJRT = ("CPU", "TPU", "CUDA", "GPU", "ROCM", "XPU", "NEURON")
_FOREIGN = {"ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
_PRECISIONS = {"no": None, "fp16": "16-mixed", "bf16": "bf16-mixed"}


@dataclass(frozen=True)
class Launch:
    """What the launcher said.

    Attributes:
        launcher: ``python`` (nobody), ``xtrain`` (this package, for ``devices=N``), ``torchrun``,
            ``accelerate``, ``accelerate-tpu``, ``mpi``, ``slurm``, or ``environment``.
        rank: number of this process, from 0.
        local_rank: its number among those of this machine.
        world_size: number of processes.
        local_world_size: number of processes on this machine; None if the launcher does not say.
        backend: the backend the launcher asked for, or None.
        precision: the precision it asked for, or None.
        warnings: what is suspicious about it.
        sources: where each value came from, as ``NAME=value``.
        address: where rank 0 keeps the store in which they meet; empty for a process that nobody placed.
        port: at which that store listens.
    """

    launcher: str = "python"
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int | None = None
    backend: str | None = None
    precision: str | None = None
    warnings: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    address: str = ""
    port: int = 0

    @property
    def joined(self) -> bool:
        """Whether the processes exist already, so that none may be started."""
        return "world_size" in self.sources


class _Environment:
    """Reads variables and notes which were used."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.sources: dict[str, str] = {}

    def number(self, name: str, use: str | None = None) -> int | None:
        raw = self.environ.get(name, "")
        if not raw:
            return None
        if not (raw.isascii() and raw.isdecimal()):
            raise ConfigurationError(explain(f"{name} as a number from 0", f"{name}={raw!r}", f"unset {name}"))
        if use is not None:
            self.sources[use] = f"{name}={raw}"
        return int(raw)

    def true(self, name: str, use: str | None = None) -> bool:
        found = self.environ.get(name, "").strip().lower() in ("1", "true", "yes", "y", "on", "t")
        if found and use is not None:
            self.sources[use] = f"{name}={self.environ[name]}"
        return found


def detect_launcher(environ: Mapping[str, str], parent: Sequence[str] = (), terminal: bool = False) -> Launch:
    """Return what started a process with these variables.

    Args:
        environ: its environment.
        parent: the command line of its parent process, empty if that is not known; the only trace of
            ``accelerate launch --cpu --num_processes 2``, which starts one process.
        terminal: whether it runs in a terminal, as what is typed into a shell of SLURM does.

    Raises:
        ConfigurationError: for variables that contradict each other, or ask for what xtrain does not run.
    """
    env = _Environment(environ)
    accelerate = any(name in environ for name in _ACCELERATE)
    backend, precision = _accelerate_wishes(env) if accelerate else (None, None)
    cluster = ""
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        cluster, variables, sources = as_torchrun(environ, terminal)
        if not cluster:
            return _without_ranks(env, accelerate, backend, precision, parent)
        wishes, env = env.sources, _Environment({**environ, **variables})
        env.sources |= wishes
    missing = [name for name in _NEEDED if not env.environ.get(name)]
    if missing:
        there = ", ".join(f"{name}={env.environ[name]}" for name in _NEEDED if env.environ.get(name))
        raise _refusal(f"{', '.join(missing)} beside {there}", "no such variable")
    rank, world = env.number("RANK", "rank") or 0, env.number("WORLD_SIZE", "world_size") or 0
    if rank >= world:
        raise _refusal("RANK below WORLD_SIZE", f"RANK={rank}, WORLD_SIZE={world}")
    launcher = cluster or _name(env, accelerate)
    local_rank, local_world = _local(env, rank, world)
    warnings = () if cluster else _cross_check(env, launcher, world, local_world)
    port = env.number("MASTER_PORT") or 0
    if not 0 < port < 2**16:
        raise _refusal("MASTER_PORT from 1 to 65535", f"MASTER_PORT={port}")
    if cluster:
        env.sources |= sources
    address = env.environ["MASTER_ADDR"]
    return Launch(
        launcher, rank, local_rank, world, local_world, backend, precision, warnings, env.sources, address, port
    )


def wanted_processes(command: Sequence[str]) -> int | None:
    """Return N of ``accelerate launch ... --num_processes N`` if `command` is such a line."""
    text = " ".join(command)
    found = re.search(r"accelerate.*--num[_-]processes(?:=|\s+)(\d+)", text)
    return int(found.group(1)) if found else None


def _refusal(expected: str, received: str) -> ConfigurationError:
    fix = "torchrun --nproc_per_node=2 script.py, or unset the variables and use Trainer(devices=2)"
    return ConfigurationError(explain(expected, received, fix))


def _accelerate_wishes(env: _Environment) -> tuple[str | None, str | None]:
    if env.true("ACCELERATE_USE_FSDP") and (version := env.environ.get("FSDP_VERSION", "1")) != "2":
        fix = "accelerate launch --use_fsdp --fsdp_version 2, or fsdp_version: 2 in fsdp_config"
        raise ConfigurationError(explain("version 2 of accelerate's FSDP settings", f"FSDP_VERSION={version}", fix))
    for variable, kind in _FOREIGN.items():
        if env.true(variable):
            fix = "accelerate config: choose no distributed training, multi-GPU, DeepSpeed, FSDP or TPU"
            raise ConfigurationError(
                explain("an accelerate configuration for CPU, MULTI_GPU, DEEPSPEED, FSDP or XLA (TPU)",
                        f"one for {kind} ({variable}={env.environ[variable]}), which xtrain does not run", fix)
            )  # fmt: skip
    if env.true("ACCELERATE_USE_DEEPSPEED") and env.true("ACCELERATE_USE_CPU") and "DS_ACCELERATOR" not in env.environ:
        received = "ACCELERATE_USE_DEEPSPEED and ACCELERATE_USE_CPU"
        fix = "unset ACCELERATE_USE_CPU, or DS_ACCELERATOR=cpu for DeepSpeed on the CPU"
        raise ConfigurationError(explain("accelerate to ask for one backend", received, fix))
    backend = next((name for variable, name in WISHES.items() if env.true(variable, "backend")), None)
    mixed = env.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if mixed not in _PRECISIONS:
        fix = "accelerate launch --mixed_precision bf16 script.py"
        raise ConfigurationError(
            explain("accelerate's mixed precision no, fp16 or bf16", f"ACCELERATE_MIXED_PRECISION={mixed}", fix)
        )
    if _PRECISIONS[mixed] is not None:
        env.sources["precision"] = f"ACCELERATE_MIXED_PRECISION={mixed}"
    return backend, _PRECISIONS[mixed]


def _without_ranks(
    env: _Environment, accelerate: bool, backend: str | None, precision: str | None, parent: Sequence[str]
) -> Launch:
    """Return the launch of a process that was given no place among others."""
    environ = env.environ
    if accelerate:
        wanted = wanted_processes(parent) or 1
        alone = wanted > 1 or "MASTER_PORT" in environ
        warnings = (_ONE_PROCESS.format(count=max(2, wanted)),) if alone else ()
        return Launch("accelerate", backend=backend, precision=precision, warnings=warnings, sources=env.sources)
    if env.true("FORK_LAUNCHED", "backend"):
        return Launch("accelerate-tpu", backend=REPLICAS, sources=env.sources)
    if environ.get("PJRT_DEVICE", "").upper() == "TPU":
        return Launch(backend=REPLICAS, sources={"backend": f"PJRT_DEVICE={environ['PJRT_DEVICE']}"})
    if env.number("LOCAL_RANK"):
        raise _refusal("RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT beside LOCAL_RANK", "LOCAL_RANK alone")
    runtime = environ.get("PJRT_DEVICE", "")
    if runtime and runtime.upper() not in _PJRT:
        fix = "unset PJRT_DEVICE, or PJRT_DEVICE=TPU"
        return Launch(warnings=(explain(f"PJRT_DEVICE out of {', '.join(_PJRT)}", f"PJRT_DEVICE={runtime}", fix),))
    tasks = env.number("SLURM_NTASKS") or 1
    script = environ.get("SLURM_JOB_NAME") not in (None, "bash", "interactive") and "SLURM_STEP_ID" not in environ
    return Launch(warnings=(_SRUN.format(tasks=tasks),) if tasks > 1 and script else ())


def _name(env: _Environment, accelerate: bool) -> str:
    names = {
        "xtrain": LAUNCH_ID in env.environ,
        "accelerate": accelerate,
        "torchrun": "TORCHELASTIC_RUN_ID" in env.environ,
        "mpi": "OMPI_COMM_WORLD_SIZE" in env.environ or "PMI_SIZE" in env.environ,
        "slurm": "SLURM_PROCID" in env.environ and (env.number("SLURM_NTASKS") or 1) > 1,
    }
    return next((name for name, found in names.items() if found), "environment")


def _local(env: _Environment, rank: int, world: int) -> tuple[int, int | None]:
    """Return rank and number of processes on this machine."""
    local, count = env.number("LOCAL_RANK", "local_rank"), env.number("LOCAL_WORLD_SIZE", "local_world_size")
    if local is None:
        on_this_host = env.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1", "::1")
        if count not in (None, 1) or (world > 1 and count is None and not on_this_host):
            raise _refusal("LOCAL_RANK beside RANK and WORLD_SIZE", "no such variable")
        local = rank if count is None else 0
    if local >= (count or world) or (count or 0) > world:
        received = f"LOCAL_RANK={local}, LOCAL_WORLD_SIZE={count}, WORLD_SIZE={world}"
        raise _refusal("LOCAL_RANK below LOCAL_WORLD_SIZE, and that at most WORLD_SIZE", received)
    return local, count


def _cross_check(env: _Environment, launcher: str, world: int, local_world: int | None) -> tuple[str, ...]:
    """Compare WORLD_SIZE with whatever else counts processes; return warnings."""
    groups, tasks = env.number("GROUP_WORLD_SIZE"), env.number("SLURM_NTASKS") or 1
    counts = {
        "slurm": ("SLURM_NTASKS", tasks),
        "mpi": ("the number of MPI processes", env.number("OMPI_COMM_WORLD_SIZE") or env.number("PMI_SIZE")),
    }
    if "TORCHELASTIC_RUN_ID" in env.environ and groups and local_world:
        # Every machine of a torchrun job has the same number of processes.
        counts[launcher] = (f"GROUP_WORLD_SIZE={groups} x LOCAL_WORLD_SIZE={local_world}", groups * local_world)
    what, count = counts.get(launcher, ("", world))
    if count != world:
        raise _refusal(f"WORLD_SIZE to be {count}, which {launcher} started ({what})", f"WORLD_SIZE={world}")
    apart = groups is not None and "SLURM_PROCID" in env.environ and tasks > 1 and tasks != groups
    return (_SLURM_TORCHRUN.format(tasks=tasks, groups=groups),) if apart else ()


_ONE_PROCESS = (
    "Expected {count} processes. Received: one; accelerate launch starts several on the CPU only through mpirun.\n"
    "Fix:  torchrun --nproc_per_node={count} script.py\n"
    "      or Trainer(devices={count}) and python script.py\n"
    "      or ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {count} --num_machines 1 "
    "--mixed_precision no --dynamo_backend no script.py"
)
_SRUN = (
    "Expected srun to start the {tasks} tasks of this job (SLURM_NTASKS). Received: one process that the batch "
    "script started itself, so it trains alone.\n"
    "Fix:  srun python script.py"
)
_SLURM_TORCHRUN = (
    "Expected one torchrun per machine that knows the others. Received: SLURM_NTASKS={tasks} tasks, but torchrun "
    "counts {groups} machine(s), so each of them trains apart.\n"
    "Fix:  srun --ntasks-per-node=1 torchrun --nnodes=$SLURM_NNODES --rdzv_backend=c10d "
    "--rdzv_endpoint=HOST:29500 --nproc_per_node=N script.py"
)
