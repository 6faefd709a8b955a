"""Real processes, started as users start them: the same parameters, and an end for all when one fails."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from xtrain import LaunchError
from xtrain.launch.children import own_command
from xtrain.testing.experiments import EXPERIMENTS, expect

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("launched.py")
BOUND = 100
"""Seconds any of these runs may take on a busy machine; what is waited for by design is far below."""


PYTHON = (sys.executable,)
TWO = ("--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no")
# Its own default is a setting of version 1, which it refuses itself under version 2.
SHARDED = ("--fsdp_reshard_after_forward", "true")


def environment(**variables):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD", "MASTER", "LOCAL_", "XTRAIN_"))}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**clean, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}


def run(*arguments, program=(sys.executable,), **variables):
    """Run the script; return its status and all it printed."""
    command = [*map(str, program), str(SCRIPT), *map(str, arguments)]
    if "accelerate.commands.launch" in program and "--tpu" not in program:
        variables["USE_TORCH_XLA"] = "0"  # it would load an installed torch_xla, unlike xtrain
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "text": True}
    done = subprocess.run(command, env=environment(**variables), timeout=BOUND, cwd=ROOT, **options)
    return done.returncode, done.stdout


def torchrun(count):
    return sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"


def accelerate(*settings):
    return sys.executable, "-m", "accelerate.commands.launch", *settings


def processes_of(token):
    """Return the processes whose command line has `token`."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if token in line.read_text(errors="replace") and int(line.parent.name) != os.getpid():
                found.append(int(line.parent.name))
        except OSError:  # it has just ended
            continue
    return found


def no_orphans(token):
    """Wait until nothing is left of a run that has ended."""
    deadline = time.monotonic() + 15
    while (left := processes_of(token)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not left


def same_as_one_process(folder, ranks, tolerance=1e-6):
    experiment = next(e for e in EXPERIMENTS if e.name == "gan-clip-norm")
    expected = expect(experiment, "32-true").parameters
    for rank in range(ranks):
        saved = torch.load(folder / f"rank-{rank}.pt")
        assert saved["world"] == ranks
        for name, value in expected.items():
            torch.testing.assert_close(saved[name], value, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------- the same parameters


@pytest.mark.parametrize(
    ("program", "variables", "backend", "processes"),
    [
        (PYTHON, {}, "cpu", "1 (no launcher)"),
        (PYTHON, {}, "cpu", "2 (given)"),
        (torchrun(2), {}, "cpu", "2 (torchrun, WORLD_SIZE=2)"),
        (accelerate("--multi_gpu", *TWO), {"ACCELERATE_USE_CPU": "true"}, "cpu", "2 (accelerate, WORLD_SIZE=2)"),
        (accelerate("--use_deepspeed", *TWO), {"DS_ACCELERATOR": "cpu"}, "deepspeed", "2 (accelerate, WORLD_SIZE=2)"),
        (accelerate("--use_fsdp", "--fsdp_version", 2, *SHARDED, *TWO), {}, "fsdp", "2 (accelerate, WORLD_SIZE=2)"),
        (accelerate("--tpu", "--main_training_function", "main"), {"PJRT_DEVICE": "CPU"}, "tpu", "1 (no launcher)"),
    ],
    ids=[
        "python",
        "python with devices=2",
        "torchrun",
        "accelerate",
        "accelerate, DeepSpeed",
        "accelerate, FSDP",
        "accelerate, TPU",
    ],
)
def test_every_launcher_trains_as_one_process(program, variables, backend, processes, tmp_path):
    devices = ["--devices", 2] if processes == "2 (given)" else []
    status, said = run("--backend", "auto", "--out", tmp_path, *devices, program=program, **variables)
    assert status == 0, said
    same_as_one_process(tmp_path, int(processes[0]), 1e-5 if backend == "tpu" else 1e-6)
    assert said.count(f"xtrain: backend={backend} ") == 1  # rank 0 alone says it
    assert f"processes={processes}" in said
    assert "still watched" not in said
    if backend == "cpu":
        assert "is done with []" in said  # torch_xla and the like may be installed, but nobody asked for them


def test_started_ranks_work_where_the_command_was_given(tmp_path):
    code = (
        f"import os, sys; sys.path[:0] = [{str(ROOT)!r}, {str(SCRIPT.parent)!r}]; import xtrain, launched; "
        f"os.chdir({str(tmp_path)!r}); sys.argv = ['x', '--devices', '4', '--out', {str(tmp_path)!r}]; launched.main()"
    )
    variables = environment(XTRAIN_MANY_PROCESSES="1")
    subprocess.run([sys.executable, "-c", code], env=variables, timeout=BOUND, cwd=ROOT, check=True)
    same_as_one_process(tmp_path, 4)  # whatever the number of cores


# ---------------------------------------------------------------- the end of a rank is the end of all


@pytest.mark.parametrize(
    ("harm", "rank", "says"),
    [
        (
            "raise",
            1,
            r"RankFailedError: Rank 1 failed first: ValueError: on purpose\n.*traceback of rank 1.*raise_error",
        ),
        ("kill", 1, "RankFailedError: Rank 1 failed first: it was killed by SIGKILL"),
        ("exit", 1, "RankFailedError: Rank 1 failed first: it ended with exit status 3"),
        ("hang", 1, "RankFailedError: Expected every rank to come to the same step.*backend_options={'timeout'"),
        ("raise", 0, "ValueError: on purpose"),
        ("interrupt", 0, "KeyboardInterrupt"),
    ],
)
def test_one_rank_fails(harm, rank, says, tmp_path):
    extra = {"hang": ["--option", "timeout=3"]}
    status, said = run("--devices", 2, "--harm", harm, "--rank", rank, "--out", tmp_path, *extra.get(harm, []))
    assert status == (130 if harm == "interrupt" else 1) or status == -signal.SIGINT, said
    assert re.search(says, said, re.DOTALL), said
    assert said.count("Error: ") + said.count("KeyboardInterrupt") < 5, f"one failure, told once: {said}"
    assert "is done" not in said
    assert "still watched" not in said
    assert no_orphans(str(tmp_path))


def test_rank_0_is_killed(tmp_path):
    status, said = run("--devices", 2, "--harm", "kill", "--rank", 0, "--out", tmp_path)
    assert status == -signal.SIGKILL, said
    assert no_orphans(str(tmp_path))


def test_torchrun_reports_the_first_error_on_every_rank(tmp_path):
    status, said = run("--harm", "raise", "--out", tmp_path, program=torchrun(2))
    assert status == 1
    assert "ValueError: on purpose" in said
    assert no_orphans(str(tmp_path))


def test_after_an_error_the_processes_are_gone(tmp_path):
    status, said = run("--devices", 2, "--harm", "raise", "--caught", "--out", tmp_path)
    assert status == 1
    assert "LaunchError: Expected the processes of this program to be alive" in said
    assert no_orphans(str(tmp_path))


# ---------------------------------------------------------------- what cannot be started


def test_one_number_of_devices_per_program(tmp_path):
    status, said = run("--devices", 2, "--again", 3, "--out", tmp_path)
    assert status == 1
    assert "devices=3 after a Trainer with devices=2" in said
    assert no_orphans(str(tmp_path))


def test_devices_must_be_what_torchrun_started():
    apart = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    status, said = run("--devices", 3, program=torchrun(2), **apart)
    assert status == 1
    assert "SLURM_NTASKS=2 tasks, but torchrun counts 1 machine(s), so each of them trains apart" in said
    assert "devices=3, but torchrun started 2 (LOCAL_WORLD_SIZE=2)" in said


def test_accelerate_that_starts_one_process_is_noticed():
    status, said = run(program=accelerate("--cpu", "--num_processes", 2))
    assert status == 0
    assert (
        "Expected 2 processes. Received: one; accelerate launch starts several on the CPU only through mpirun" in said
    )
    assert "torchrun --nproc_per_node=2 script.py" in said


@pytest.mark.parametrize(
    ("settings", "flags", "says"),
    [
        (
            ["distributed_type: FSDP", "fsdp_config: {fsdp_version: 1}"],
            [],
            "Expected version 2 of accelerate's FSDP settings. Received: FSDP_VERSION=1",
        ),
        (
            ["distributed_type: 'NO'", "use_cpu: true"],
            ["--backend", "cuda"],
            "backend='cuda', but ACCELERATE_USE_CPU=True asks for 'cpu'",
        ),
    ],
    ids=["a kind that is not run", "a script that disagrees"],
)
def test_configuration_files_of_accelerate(settings, flags, says, tmp_path):
    common = ["compute_environment: LOCAL_MACHINE", "mixed_precision: 'no'", "num_machines: 1", "num_processes: 1"]
    file = tmp_path / "accelerate.yaml"
    file.write_text("\n".join([*common, *settings]), encoding="utf-8")
    status, said = run(*flags, program=accelerate("--config_file", file))
    assert status == 1
    assert says in said
    assert "Fix: " in said


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def by_hand(rank, count, port):
    return {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def joining(rank, count, port, seconds=2):
    """Join a run from a process of its own; return what it printed."""
    # Where the tests run in the background, a shell may have told them, and so this process, to ignore Ctrl-C.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heed}; from xtrain.launch import join; join.join(seconds={seconds}); print('joined')"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment(**by_hand(rank, count, port)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said_by(process):
    return process.communicate(timeout=BOUND)[0]


def test_a_missing_rank_is_named():
    port, other = free_port(), free_port()
    alone, lost = joining(0, 3, port), joining(1, 2, other)
    assert "Expected 3 ranks (WORLD_SIZE). Received: none of rank 1, 2 within 2 s" in said_by(alone)
    assert f"Expected rank 0 at MASTER_ADDR=127.0.0.1 MASTER_PORT={other}" in said_by(lost)


def test_a_busy_port_is_named():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert f"Received: MASTER_PORT={port}, in use on 127.0.0.1" in said_by(joining(0, 2, port))


def test_a_rank_started_twice_is_told():
    port = free_port()
    first, second = joining(0, 2, port, 40), joining(0, 2, port, 40)
    while first.poll() is None and second.poll() is None:  # rank 1 would let one of them end before the other starts
        time.sleep(0.05)
    third = joining(1, 2, port, 40)
    said = [said_by(process) for process in (first, second, third)]
    assert any("two with RANK=0" in text or "in use on" in text for text in said[:2]), said


@pytest.mark.parametrize(
    ("main", "arguments", "says"),
    [
        ({"__file__": "/bin/pytest"}, ["python", "-m", "pytest"], "whole test session"),
        ({"__file__": None}, ["python"], "standard input"),
        ({"__file__": "/x/ipykernel_launcher.py"}, ["python", "/x/ipykernel_launcher.py"], "interactive session"),
    ],
)
def test_commands_that_cannot_be_run_again_are_refused(main, arguments, says, monkeypatch):
    fake = types.ModuleType("__main__")
    fake.__dict__.update(main)
    monkeypatch.setitem(sys.modules, "__main__", fake)
    with pytest.raises(LaunchError, match=says):
        own_command(arguments)


def test_the_command_is_run_again_as_it_was(monkeypatch):
    fake = types.ModuleType("__main__")
    fake.__file__ = "script.py"
    monkeypatch.setitem(sys.modules, "__main__", fake)
    assert own_command(["python", "-X", "dev", "script.py", "--a", "1"]) == [
        sys.executable,
        *["-X", "dev", "script.py", "--a", "1"],
    ]
