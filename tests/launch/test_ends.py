"""How runs of several processes end and who can reach them: real processes, real signals, real sockets."""

import csv
import importlib.util
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_launch import BOUND, ROOT, by_hand, environment, free_port, joining, said_by

_SPEC = importlib.util.spec_from_file_location("bench_ranks", ROOT / "ci" / "bench" / "ranks.py")
faults = importlib.util.module_from_spec(_SPEC)
sys.modules["bench_ranks"] = faults
_SPEC.loader.exec_module(faults)


# ---------------------------------------------------------------- a rank that fails


@pytest.mark.parametrize(
    ("fault", "workers", "says"),
    [
        ("kill -9", 2, "Rank 1 failed first: it was killed by SIGKILL"),
        ("exception", 2, "Rank 1 failed first: ValueError: on purpose"),
        ("exit 0", 0, "Rank 1 failed first: it ended before the run was over"),
        ("hang", 0, r"nothing from rank 1; .*average the gradients of optimizer 0 .*, in training step 20 of epoch 0"),
    ],
)
def test_rank_0_reads_what_happened_and_may_save(fault, workers, says):
    end = faults.run(fault, workers=workers)
    assert end.status == 1
    assert re.search(says, end.said), end.said
    assert "on_exception on rank 0" in end.said
    assert "came to the end" not in end.said


def test_a_rank_that_pauses_is_waited_for():
    end = faults.run("SIGSTOP")
    assert (end.status, end.said.count("came to the end")) == (0, 2), end.said


SCRIPT = """
import os
import sys
from pathlib import Path
import torch
from torch.utils.data import DataLoader
from xtrain import LightningModule, Trainer, seed_everything
from xtrain.loggers import CSVLogger

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()
    def teardown(self, stage):
        if {fails} and self.global_rank == 1:
            raise ValueError("too late")

logger = CSVLogger(sys.argv[1])
trainer = Trainer("cpu", devices={devices}, max_epochs=1, logger=logger, enable_progress_bar=False)
trainer.fit(Module(), DataLoader(torch.randn(16, 3), batch_size=4))
where = (trainer.global_rank, trainer.world_size, Path(logger.log_dir).name)
os.write(1, ("rank %d of %d logs to %s\\n" % where).encode())  # in one go: ranks share the output
"""


def run(folder, *, fails=False, devices=2, given=None, **variables):
    """Run the script from a file, or as `given`, a command; return the process when it has ended."""
    text = SCRIPT.format(fails=fails, devices=devices)
    script = folder / "script.py"
    script.write_text(text, encoding="utf-8")
    command = [*(given or [sys.executable, str(script)]), str(folder)]
    options = {"input": text, "capture_output": True, "text": True, "timeout": BOUND, "cwd": ROOT}
    return subprocess.run(command, env=environment(**variables), check=False, **options)


def test_fit_returns_on_rank_0_only_when_all_ranks_ended_well(tmp_path):
    done = run(tmp_path, fails=True)
    assert done.returncode == 1
    assert "Rank 1 failed first: ValueError: too late" in done.stderr
    assert "rank 0" not in done.stdout


def test_all_ranks_know_the_folder_of_rank_0(tmp_path):
    for version in (0, 1):
        done = run(tmp_path)
        assert done.returncode == 0, done.stderr
        expected = [f"rank {rank} of 2 logs to version_{version}\n" for rank in (0, 1)]
        assert sorted(re.findall(r"rank \d of \d logs to .*\n", done.stdout)) == expected  # gloo prints, too


@pytest.mark.parametrize("given", [[sys.executable, "-"], [sys.executable, "/dev/stdin"]], ids=["-", "/dev/stdin"])
def test_a_program_from_standard_input_is_refused(given, tmp_path):
    done = run(tmp_path, given=given)
    assert done.returncode == 1
    assert "LaunchError: Expected a command that can be run again for every rank" in done.stderr
    assert "Received: a program read from standard input or a pipe" in done.stderr


def test_more_processes_than_processors_need_a_reason(tmp_path):
    done = run(tmp_path, devices=4096)
    assert done.returncode == 1
    assert "devices=4096, on a machine with" in done.stderr
    assert "XTRAIN_MANY_PROCESSES=1" in done.stderr


@pytest.mark.parametrize("number", ["abc", "1", ""])
def test_a_parent_that_is_none_is_ignored(number):
    code = "import xtrain, time; time.sleep(1.5); print('alive')"
    options = {"capture_output": True, "text": True, "timeout": BOUND, "cwd": ROOT, "check": False}
    done = subprocess.run([sys.executable, "-c", code], env=environment(XTRAIN_PARENT_PID=number), **options)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


# ---------------------------------------------------------------- waiting


def test_a_name_that_does_not_resolve_fails_at_once():
    variables = {**by_hand(1, 2, 29500), "MASTER_ADDR": "nobody.invalid"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", "from xtrain.launch import join; join.join(seconds=300)"],
        env=environment(**variables), capture_output=True, text=True, timeout=BOUND, cwd=ROOT, check=False,
    )  # fmt: skip
    assert "Expected rank 0 at MASTER_ADDR=nobody.invalid" in done.stderr
    assert "the name does not resolve" in done.stderr
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_works_while_ranks_are_waited_for(rank):
    waiting = joining(rank, 2, free_port(), seconds=300)
    time.sleep(8)  # torch has been imported, and the waiting has begun
    assert waiting.poll() is None
    waiting.send_signal(signal.SIGINT)
    began = time.monotonic()
    said = said_by(waiting)
    assert "KeyboardInterrupt" in said
    assert time.monotonic() - began < 10


INTERRUPTED = """
import os, signal, sys, threading, time
import torch
from torch import distributed as dist
from torch.utils.data import DataLoader
from xtrain import Callback, LightningModule, Trainer
from xtrain.loggers import CSVLogger

def hang(*arguments, **options):
    time.sleep(600)

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(3, 1)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        self.manual_backward(self.layer(batch).square().mean())
        if batch_idx == 3:
            if self.global_rank == 1:
                for name in {hanging}:  # after the header, in the middle of the data
                    setattr(dist, name, hang)
            else:
                threading.Timer(4, os.kill, (os.getpid(), signal.SIGINT)).start()
                self.began = time.monotonic() + 4
        opt.step()
        self.log("index", batch_idx)

class Told(Callback):
    def on_exception(self, trainer, module, error):
        took = time.monotonic() - module.began
        os.write(1, ("%s after %.1f s\\n" % (type(error).__name__, took)).encode())

trainer = Trainer({backend!r}, devices=2, max_epochs=1, backend_options={options},
                  logger=CSVLogger(sys.argv[1], flush_logs_every_n_steps=1000),
                  log_every_n_steps={every}, callbacks=[Told()], enable_progress_bar=False)
trainer.fit(Module(), DataLoader(torch.randn(32, 3), batch_size=2))
"""


@pytest.mark.parametrize(
    ("backend", "options", "hanging", "every"),
    [
        ("cpu", {}, ["all_reduce"], 1),
        ("cpu", {}, ["all_reduce"], 50),
        ("fsdp", {"device": "cpu"}, ["all_gather_into_tensor", "all_gather_single"], 1),  # its own, in a forward
        ("deepspeed", {"stage": 3}, ["all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"], 1),
    ],
    ids=["each step", "every 50 steps", "fsdp", "deepspeed"],
)
def test_ctrl_c_works_in_the_middle_of_data_and_no_row_is_lost(backend, options, hanging, every, tmp_path):
    script = tmp_path / "script.py"
    text = INTERRUPTED.format(backend=backend, options=options, hanging=hanging, every=every)
    script.write_text(text, encoding="utf-8")
    settings = {"capture_output": True, "text": True, "timeout": BOUND, "cwd": ROOT, "check": False}
    variables = environment(DS_ACCELERATOR="cpu")
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], env=variables, **settings)
    took = re.search(r"KeyboardInterrupt after (\S+) s", done.stdout)
    assert took, done.stdout + done.stderr
    assert float(took[1]) < 2
    assert done.returncode == -signal.SIGINT, "no SIGABRT"
    (table,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    made = 4 if backend == "fsdp" else 3  # FSDP2 gathers parameters for the next forward
    assert [float(row["index"]) for row in rows] == (list(range(made)) if every == 1 else [2.0])


def test_something_else_that_listens_is_told():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(16)
        port = other.getsockname()[1]
        said = said_by(joining(1, 2, port, seconds=300))
    assert f"Expected rank 0 at MASTER_ADDR=127.0.0.1 MASTER_PORT={port}" in said


# ---------------------------------------------------------------- who can reach a run


def listening(pids):
    """Return the addresses at which processes listen, as Linux writes them in hexadecimal."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            target = str(link.readlink()) if link.is_symlink() else ""
            inodes.add(target.removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


def test_the_store_of_a_run_listens_on_the_loopback_alone():
    code = (
        "import os; from xtrain.launch import join; from xtrain.launch.children import own_command\n"
        "world = join.join(2, seconds=60)\n"
        "if world.children: print(world.token, flush=True); input()"
    )
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-c", code], env=environment(), **options) as process:
        token = process.stdout.readline().strip()
        assert re.fullmatch(r"[0-9a-f]{32}", token), token
        assert listening([process.pid]) == {"0100007F"}, "127.0.0.1"
        process.communicate("\n", timeout=BOUND)


# ---------------------------------------------------------------- clusters, with their variables


def cluster(rank, name, port):
    if name == "mpirun":  # on one machine the port follows from the common parent
        own = {"RANK": rank, "SIZE": 2, "LOCAL_RANK": rank, "LOCAL_SIZE": 2}
        return {f"OMPI_COMM_WORLD_{key}": str(value) for key, value in own.items()}
    own = {"PROCID": rank, "LOCALID": rank, "NTASKS": 2, "STEP_ID": 0, "NODEID": 0, "TASKS_PER_NODE": 2}
    own |= {"JOB_NODELIST": "localhost", "JOB_ID": port, "JOB_NAME": "train"}
    return {f"SLURM_{key}": str(value) for key, value in own.items()}


@pytest.mark.parametrize("name", ["srun", "mpirun"])
def test_the_processes_of_a_cluster_train_together(name, tmp_path):
    port = free_port()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(fails=False, devices=None), encoding="utf-8")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    command = [sys.executable, str(script), str(tmp_path)]
    started = [subprocess.Popen(command, env=environment(**cluster(rank, name, port)), **options) for rank in (0, 1)]
    for rank, process in enumerate(started):
        said = said_by(process)
        assert process.returncode == 0, said
        assert f"rank {rank} of 2 logs to version_0" in said
    assert [path.name for path in (tmp_path / "lightning_logs").iterdir()] == ["version_0"]


# ---------------------------------------------------------------- a training that went well

LAST_MOMENT = """
import sys, time
import torch, torch.distributed as dist
from xtrain import Trainer

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # nobody destroys it
Trainer("fsdp").backend.launch()
sys.setswitchinterval(100)
dist.all_gather([torch.empty(100)], torch.ones(100), async_op=True)
end = time.monotonic() + 1
while time.monotonic() < end:  # the thread of gloo has finished, and waits for the interpreter to drop the tensors
    pass
"""


def test_threads_of_a_group_that_outlives_the_run_do_not_abort_the_interpreter():
    done = subprocess.run([sys.executable, "-c", LAST_MOMENT], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
