"""SLURM and MPI: what ``srun`` and ``mpirun`` tell the processes they start, in the variables of torchrun."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from xtrain.errors import ConfigurationError, explain

_MPI = {  # rank, number of ranks, and both on this machine
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "hydra": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
_TASKS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")  # of the step, which may have fewer than the job
_SHELLS = ("interactive", "bash", "sh", "zsh", "fish", "ksh", "csh", "tcsh")
_SLURM_OWN_STEPS = 2**32 - 16  # from here on: the shell of salloc, the batch script, ...
_FIRST_PORT, _PORTS = 20000, 10000


def srun_step(environ: Mapping[str, str], terminal: bool) -> bool:
    """Return whether ``srun`` started this process as one of a step's tasks.

    A batch script is none, nor is what was typed into a shell: ``salloc`` or ``srun --pty bash``. Jobs have the name of
    their shell also for ``srun bash -c "python script.py"``, which starts as many as any other; no terminal is there.
    """
    typed = terminal and environ.get("SLURM_JOB_NAME") in _SHELLS
    own = "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ
    return own and not typed and _number(environ, "SLURM_STEP_ID") < _SLURM_OWN_STEPS


def as_torchrun(environ: Mapping[str, str], terminal: bool = False) -> tuple[str, dict[str, str], dict[str, str]]:
    """Translate the variables of a cluster's launcher.

    Args:
        environ: of this process, which has no RANK.
        terminal: whether it runs in one.

    Returns:
        The launcher's name (empty if there is none), the variables RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE,
        MASTER_ADDR and MASTER_PORT, and for the numbers where each comes from, as ``NAME=value``.

    Raises:
        ConfigurationError: if it does not say where rank 0 is.
    """
    for names in _MPI.values():
        # Open MPI starts its helpers by srun, so its own variables count first.
        if names[0] in environ and names[1] in environ and (names[0] != "PMI_RANK" or names[2] in environ):
            return "mpi", *_mpi(environ, names)
    if srun_step(environ, terminal) and _number(environ, *_TASKS) > 1:
        return "slurm", *_slurm(environ)
    if "PMI_RANK" in environ and "PMI_SIZE" in environ:
        return "mpi", *_mpi(environ, _MPI["hydra"])
    return "", {}, {}


def _slurm(environ: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if not hosts and "MASTER_ADDR" not in environ:
        fix = "MASTER_ADDR=host MASTER_PORT=29500 srun python script.py"
        raise ConfigurationError(explain("SLURM_JOB_NODELIST, for the address of rank 0", "no such variable", fix))
    job = re.sub(r"\D", "", environ.get("SLURM_JOB_ID") or environ.get("SLURM_JOBID") or "") or "0"
    step = re.sub(r"\D", "", environ["SLURM_STEP_ID"]) or "0"
    total = next(name for name in _TASKS if environ.get(name))
    names = {"rank": "SLURM_PROCID", "local_rank": "SLURM_LOCALID", "world_size": total}
    found = {key: str(_number(environ, name)) for key, name in names.items() if environ.get(name)}
    sources = {key: f"{names[key]}={value}" for key, value in found.items()}
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    counts = _counts(tasks or "")
    node = _number(environ, "SLURM_NODEID")
    if node < len(counts):
        found["local_world_size"] = str(counts[node])
        sources["local_world_size"] = f"SLURM_TASKS_PER_NODE={tasks}"
    port = _FIRST_PORT + (int(job) * 31 + int(step)) % _PORTS
    return _variables(environ, found, first_host(hosts or ""), port), sources


def _mpi(environ: Mapping[str, str], names: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str]]:
    keys = ("rank", "world_size", "local_rank", "local_world_size")
    found = {k: str(_number(environ, name)) for k, name in zip(keys, names, strict=True) if environ.get(name)}
    sources = {key: f"{name}={environ[name]}" for key, name in zip(keys, names, strict=True) if key in found}
    here = found.get("local_world_size") == found["world_size"]
    if not here and found["world_size"] != "1" and not {"MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
        received = f"{sources['world_size']} on several machines, or no {names[3]}"
        fix = (
            "mpirun -x MASTER_ADDR=$(hostname) -x MASTER_PORT=29500 -n 4 python script.py\n"
            "      (MPICH and Intel MPI: mpirun -genv MASTER_ADDR $(hostname) -genv MASTER_PORT 29500 ...)"
        )
        raise ConfigurationError(explain("MASTER_ADDR and MASTER_PORT, the place of rank 0", received, fix))
    # On one machine all of them have the same parent, which no other run has.
    return _variables(environ, found, "127.0.0.1", _FIRST_PORT + os.getppid() % _PORTS), sources


def _variables(environ: Mapping[str, str], found: Mapping[str, str], address: str, port: int) -> dict[str, str]:
    numbers = {key.upper(): value for key, value in found.items()}
    place = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    return {**numbers, **place, **{name: environ[name] for name in place if environ.get(name)}}


def _number(environ: Mapping[str, str], *names: str) -> int:
    """Return the number in the first of `names` that is set, 0 if none is."""
    name = next((name for name in names if environ.get(name)), "")
    raw = environ.get(name, "0")
    if not (raw.isascii() and raw.isdecimal()):
        raise ConfigurationError(explain(f"{name} as a number from 0", f"{name}={raw!r}", f"unset {name}"))
    return int(raw)


def first_host(hosts: str) -> str:
    """Return the first machine of a list as SLURM writes it: ``gpu[007-009,012],login1`` begins with ``gpu007``."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", hosts.strip())
    return "" if found is None else "".join(part or "" for part in found.groups())


def _counts(tasks: str) -> list[int]:
    """Return the tasks of each node of a list as SLURM writes it: ``2(x3),1`` is 2, 2, 2, 1."""
    pairs = re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks)
    return [int(count) for count, times in pairs for _ in range(int(times or 1))]
