"""What started this process: every launcher as a row of variables, and what is chosen from them."""

import pytest

from xtrain import ConfigurationError, Trainer
from xtrain.launch.auto import agreed_precision, resolve, resolve_backend
from xtrain.launch.clusters import first_host
from xtrain.launch.environment import Launch, detect_launcher, wanted_processes

MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
PLAIN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **MASTER}
TORCHRUN = {**PLAIN, "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}
ONE = {**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
ON_CPU = {**ACCELERATE, "ACCELERATE_USE_CPU": "True"}
ZERO = {**TORCHRUN, **ACCELERATE, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
COMMAND = ("/bin/python3", "/bin/accelerate", "launch", "--cpu", "--num_processes", "2", "script.py")
SRUN = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "train"}
STEP = {**SRUN, "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "gpu[07-08],big1", "SLURM_JOB_ID": "9"}

ROWS = {
    "nothing": ({}, (), {"launcher": "python", "world_size": 1, "joined": False}),
    "torchrun": (TORCHRUN, (), {"launcher": "torchrun", "rank": 1, "local_rank": 1, "world_size": 2, "joined": True}),
    "torchrun of one": (ONE, (), {"launcher": "torchrun", "world_size": 1, "joined": True}),
    "accelerate cpu": (ON_CPU, COMMAND[:3], {"launcher": "accelerate", "backend": "cpu", "warnings": ()}),
    "accelerate multi_gpu on cpu": (
        {**TORCHRUN, **ON_CPU, "ACCELERATE_MIXED_PRECISION": "bf16"},
        (),
        {"launcher": "accelerate", "world_size": 2, "backend": "cpu", "precision": "bf16-mixed"},
    ),
    "accelerate deepspeed": (ZERO, (), {"launcher": "accelerate", "backend": "deepspeed", "precision": None}),
    "accelerate tpu": (
        {"PJRT_DEVICE": "CPU", "FORK_LAUNCHED": "1"},
        (),
        {"launcher": "accelerate-tpu", "backend": "tpu", "joined": False},
    ),
    "accelerate on one gpu": ({**ACCELERATE, "ACCELERATE_USE_CPU": "False"}, (), {"backend": None, "warnings": ()}),
    "a TPU runtime": ({"PJRT_DEVICE": "TPU"}, (), {"launcher": "python", "backend": "tpu"}),
    "a TPU runtime on the CPU": ({"PJRT_DEVICE": "CPU"}, (), {"backend": None}),
    "slurm and torchrun": ({**TORCHRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (), {"launcher": "torchrun"}),
    "two machines": (
        {**TORCHRUN, "WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
        (),
        {"launcher": "torchrun", "world_size": 4, "warnings": ()},
    ),
    "slurm with ranks": ({**PLAIN, **SRUN, "SLURM_NTASKS": "2"}, (), {"launcher": "slurm", "rank": 1}),
    "mpi": ({**PLAIN, "OMPI_COMM_WORLD_SIZE": "2"}, (), {"launcher": "mpi"}),
    "a shell of salloc": (
        {**SRUN, "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive", "SLURM_STEP_ID": str(2**32 - 6)},
        (),
        {"launcher": "python", "warnings": ()},
    ),
    "srun of a shell that starts python": (
        {**STEP, "SLURM_JOB_NAME": "bash"},
        (),
        {"launcher": "slurm", "world_size": 4},
    ),
    "srun typed into salloc": ({**STEP, "SLURM_JOB_NAME": "interactive"}, (), {"launcher": "slurm", "world_size": 4}),
    "by hand": ({k: PLAIN[k] for k in ("RANK", "WORLD_SIZE", *MASTER)}, (), {"launcher": "environment", "rank": 1}),
    "srun": (
        {**STEP, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_TASKS_PER_NODE": "2(x2)"},
        (),
        {"launcher": "slurm", "rank": 3, "local_rank": 1, "world_size": 4, "local_world_size": 2, "address": "gpu07"},
    ),
    "srun of a part of the job": (
        {**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n[3,5]", "MASTER_PORT": "4000"},
        (),
        {"rank": 0, "world_size": 2, "address": "n3", "port": 4000},
    ),
    "srun of one task": ({**STEP, "SLURM_NTASKS": "1"}, (), {"launcher": "python", "warnings": ()}),
    "mpirun": (
        {
            "OMPI_COMM_WORLD_RANK": "1",
            "OMPI_COMM_WORLD_SIZE": "2",
            **{f"OMPI_COMM_WORLD_LOCAL_{n}": v for n, v in (("RANK", "1"), ("SIZE", "2"))},
            "SLURM_PROCID": "0",
            "SLURM_STEP_ID": "0",
            "SLURM_NTASKS": "1",
        },
        (),
        {"launcher": "mpi", "rank": 1, "local_rank": 1, "world_size": 2, "address": "127.0.0.1", "joined": True},
    ),
    "mpirun on two machines": (
        {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2", **MASTER},
        (),
        {"launcher": "mpi", "rank": 2, "local_rank": 0, "world_size": 4, "local_world_size": 2, "port": 29500},
    ),
    "mpirun of one": ({"PMI_RANK": "0", "PMI_SIZE": "1"}, (), {"launcher": "mpi", "world_size": 1, "joined": True}),
    "xtrain": ({**PLAIN, "XTRAIN_LAUNCH_ID": "7"}, (), {"launcher": "xtrain", "joined": True}),
}


@pytest.mark.parametrize("row", ROWS)
def test_launchers(row):
    environ, parent, expected = ROWS[row]
    launch = detect_launcher(environ, parent)
    assert {name: getattr(launch, name) for name in expected} == expected


def test_a_shell_of_slurm_in_a_terminal_trains_alone():
    shell = {**STEP, "SLURM_JOB_NAME": "bash"}
    assert detect_launcher(shell, terminal=True).world_size == 1
    assert detect_launcher({**shell, "SLURM_JOB_NAME": "python"}, terminal=True).world_size == 4


@pytest.mark.parametrize(
    ("environ", "parent", "says"),
    [
        ({**ON_CPU, **MASTER}, COMMAND, "Expected 2 processes.*torchrun --nproc_per_node=2"),
        ({**ON_CPU, **MASTER}, (), "Expected 2 processes"),  # a configuration file of the kind MULTI_CPU
        ({**TORCHRUN, "RANK": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, (), "trains apart"),
        ({"SLURM_PROCID": "0", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "4"}, (), "4 tasks.*srun python script.py"),
        ({"PJRT_DEVICE": "GARBAGE"}, (), "PJRT_DEVICE=GARBAGE"),
    ],
)
def test_suspicious_launches_are_told(environ, parent, says, monkeypatch):
    monkeypatch.setattr("xtrain.launch.auto._warned", set())
    launch = detect_launcher(environ, parent)
    monkeypatch.setattr("xtrain.launch.auto.current_launch", lambda: launch)
    with pytest.warns(UserWarning, match=f"(?s){says}"):
        resolve("cpu", None, None)


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT beside RANK=0"),
        ({"WORLD_SIZE": "2"}, "Expected RANK"),
        ({**TORCHRUN, "WORLD_SIZE": "3"}, r"WORLD_SIZE to be 2, which torchrun started.*WORLD_SIZE=3"),
        ({**TORCHRUN, "RANK": "2"}, "RANK=2, WORLD_SIZE=2"),
        ({**TORCHRUN, "RANK": "x"}, "RANK='x'"),
        ({**TORCHRUN, "RANK": "\u0660"}, "RANK="),
        ({**TORCHRUN, "LOCAL_RANK": "5"}, "LOCAL_RANK=5"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK alone"),
        ({**TORCHRUN, "MASTER_PORT": "abc"}, "MASTER_PORT='abc'"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
        ({**SRUN, "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, "SLURM_JOB_NODELIST"),
        ({**STEP, "SLURM_NTASKS": "x"}, "SLURM_NTASKS='x'"),
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            "mpirun -x MASTER_ADDR",
        ),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "no MPI_LOCALNRANKS"),
        ({**ACCELERATE, "ACCELERATE_USE_CPU": "1", "ACCELERATE_USE_DEEPSPEED": "1"}, "one backend"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"RANK": "0", "WORLD_SIZE": "2", **MASTER, "MASTER_ADDR": "host"}, "LOCAL_RANK beside RANK"),
        ({**PLAIN, **SRUN, "SLURM_NTASKS": "4"}, "WORLD_SIZE to be 4, which slurm started"),
        ({**PLAIN, "OMPI_COMM_WORLD_SIZE": "4"}, "WORLD_SIZE to be 4, which mpi started"),
        ({**TORCHRUN, **ACCELERATE, "ACCELERATE_USE_FSDP": "true"}, "FSDP_VERSION=1.*\n.*--fsdp_version 2"),
        ({**ACCELERATE, "ACCELERATE_USE_MEGATRON_LM": "1"}, "Megatron-LM"),
        ({**ACCELERATE, "ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION=fp8"),
    ],
)
def test_contradictions_are_refused(environ, says):
    with pytest.raises(ConfigurationError, match=says) as caught:
        detect_launcher(environ)
    assert "Fix: " in str(caught.value)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("a1,a2", "a1"), ("gpu[007-009,012],x", "gpu007"), ("r[1,3]n2", "r1n2"), ("h-1.x.org", "h-1.x.org"), ("", "")],
)
def test_the_first_machine_of_a_list(hosts, first):
    assert first_host(hosts) == first


def test_wanted_processes():
    assert wanted_processes(COMMAND) == 2
    assert wanted_processes(["accelerate", "launch", "--num-processes=8", "s.py"]) == 8
    assert wanted_processes(["python", "s.py", "--num_processes", "2"]) is None


def test_auto_follows_the_launcher_then_the_hardware(monkeypatch):
    assert resolve_backend("auto", detect_launcher(ZERO)) == "deepspeed"
    assert resolve_backend("auto", detect_launcher({"PJRT_DEVICE": "TPU"})) == "tpu"
    assert resolve_backend("auto", detect_launcher(ON_CPU)) == "cpu"
    for found in (True, False):
        monkeypatch.setattr("torch.cuda.is_available", lambda found=found: found)
        assert resolve_backend("auto", Launch()) == ("cuda" if found else "cpu")


def test_what_the_script_says_must_agree_with_the_launcher():
    launch = detect_launcher({**ZERO, "ACCELERATE_MIXED_PRECISION": "bf16"})
    assert resolve_backend("deepspeed", launch) == "deepspeed"
    assert resolve_backend("cuda", Launch()) == "cuda"
    with pytest.raises(ConfigurationError, match=r"backend='cpu', but ACCELERATE_USE_DEEPSPEED=true asks for"):
        resolve_backend("cpu", launch)
    assert agreed_precision(None, launch).name == agreed_precision("bf16", launch).name == "bf16-mixed"
    assert agreed_precision(None, Launch()).name == "32-true"
    with pytest.raises(ConfigurationError, match=r"precision='32-true', but ACCELERATE_MIXED_PRECISION=bf16"):
        agreed_precision("32-true", launch)


def test_a_trainer_knows_where_its_settings_come_from(monkeypatch):
    for name, value in ({**ONE, **ON_CPU, "ACCELERATE_MIXED_PRECISION": "bf16"}).items():
        monkeypatch.setenv(name, value)
    trainer = Trainer("auto")
    assert (trainer.backend.name, trainer.precision.name) == ("cpu", "bf16-mixed")
    assert trainer.origin == (
        "xtrain: backend=cpu (ACCELERATE_USE_CPU=True); precision=bf16-mixed (ACCELERATE_MIXED_PRECISION=bf16); "
        "processes=1 (accelerate, WORLD_SIZE=1)"
    )
    with pytest.raises(ConfigurationError, match=r"devices=2, but accelerate started 1 \(LOCAL_WORLD_SIZE=1\)"):
        Trainer("auto", devices=2).validate(_module(), [1])


def _module():
    from xtrain.testing.experiments.gan import Gan

    return Gan()
