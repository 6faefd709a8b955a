"""The folder a checkpoint is: written whole or not at all, read without running code, damage noticed."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from small import says

from xtrain import CheckpointError
from xtrain.checkpoint.disk import Disk, remove_leftovers
from xtrain.checkpoint.format import Checkpoint, Draft, checkpoints_in
from xtrain.checkpoint.locks import Lock


def write(target: Path, value: float = 1.0, **sections) -> Path:
    draft = Draft(target)
    for name, content in ({"module.pt": {"w": torch.full((5,), value)}} | sections).items():
        draft.write(name, content)
    return draft.finish({"global_step": int(value)})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_keeps_ties_and_plain_values(tmp_path):
    weight = torch.randn(4, 3)
    content = {
        "a": weight, "b": weight, "n": None, "t": (1, 2.5, 1j, b"x", {1, 2}), "o": OrderedDict(k=Counter("aab")),
        "d": torch.bfloat16, "p": torch.nn.Parameter(weight), "s": torch.eye(3).to_sparse(),
    }  # fmt: skip
    opened = Checkpoint(write(tmp_path / "x.ckpt", 3, **{"training.pt": content}))
    opened.verify()
    read = opened.read("training.pt")
    assert read["a"].data_ptr() == read["b"].data_ptr()
    assert torch.equal(read["a"], weight)
    assert read["t"] == content["t"]
    assert read["o"] == content["o"]
    assert torch.equal(read["s"].to_dense(), torch.eye(3))
    assert opened.summary == {"global_step": 3}
    assert names(tmp_path) == ["x.ckpt"]
    assert names(tmp_path / "x.ckpt") == ["manifest.json", "module.pt", "training.pt"]


class Own:
    pass


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"a": {"b": [1, np.zeros(3)]}}, ("numpy.ndarray at training.pt['a']['b'][1]", "torch.from_numpy")),
        ({"a": np.float64(3)}, ("numpy.float64 at training.pt['a']", "float(x)")),
        ({"path": Path("x")}, ("at training.pt['path']", "str(path)")),
        ({"own": (Own(),)}, ("Own at training.pt['own'][0]",)),
        ({"d": defaultdict(int)}, ("collections.defaultdict at training.pt['d']",)),
        ({Own: 1}, ("a key of training.pt",)),
    ],
)
def test_what_could_not_be_read_back_is_refused_and_nothing_is_left(tmp_path, content, parts):
    draft = Draft(tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError) as caught:
        draft.write("training.pt", content)
    says(caught.value, *parts)
    draft.abandon()
    assert names(tmp_path) == []


EDITS = {
    "torn manifest": lambda text: text[: len(text) // 2],
    "edited manifest": lambda text: text.replace('"global_step": 1', '"global_step": 9'),
    "newer schema": lambda text: text.replace('"schema": 1', '"schema": 2'),
    "wrong schema": lambda text: text.replace('"schema": 1', '"schema": "x"'),
    "foreign manifest": lambda text: "[1, 2]",
    "leaves its folder": lambda text: text.replace("module.pt", "../module.pt"),
}


def damage(path: Path, how: str) -> None:
    module, manifest = path / "module.pt", path / "manifest.json"
    if how in EDITS:
        manifest.write_text(EDITS[how](manifest.read_text()))
    elif how == "truncated":
        module.write_bytes(module.read_bytes()[:-7])
    elif how == "flipped bit":
        data = bytearray(module.read_bytes())
        data[data.index(torch.full((5,), 1.0).numpy().tobytes()) + 2] ^= 1
        module.write_bytes(data)
    else:
        (module if how == "missing file" else manifest).unlink()


@pytest.mark.parametrize(
    ("how", "part"),
    [
        ("truncated", "bytes"),
        ("flipped bit", "sha256"),
        ("missing file", "module.pt"),
        ("no manifest", "without one"),
        ("torn manifest", "manifest.json of a checkpoint"),
        ("edited manifest", "changed since"),
        ("newer schema", "pip install -U xtrain-torch"),
        ("wrong schema", "schema 'x'"),
        ("foreign manifest", "manifest.json of a checkpoint"),
        ("leaves its folder", "changed since"),
    ],
)
def test_damage_is_noticed_and_an_older_whole_one_is_picked(tmp_path, how, part):
    write(tmp_path / "older.ckpt", 0)
    path = write(tmp_path / "newer.ckpt")
    assert [c.path.name for c in checkpoints_in(tmp_path)] == ["newer.ckpt", "older.ckpt"]
    damage(path, how)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path).verify()
    says(caught.value, part)
    if how != "flipped bit":  # that one takes reading every byte
        assert [c.path.name for c in checkpoints_in(tmp_path)] == ["older.ckpt"]


def test_torch_itself_does_not_notice_a_flipped_bit(tmp_path):
    """Why the manifest has checksums."""
    path = write(tmp_path / "x.ckpt")
    damage(path, "flipped bit")
    assert not torch.equal(torch.load(path / "module.pt", weights_only=True)["w"], torch.ones(5))


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_hostile_section_runs_nothing(tmp_path):
    path = write(tmp_path / "x.ckpt")
    opened = Checkpoint(path)
    torch.save({"w": Payload(tmp_path / "ran")}, path / "module.pt")
    with pytest.raises(CheckpointError):
        opened.read("module.pt")
    (path / "module.pt").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(CheckpointError):
        opened.read("module.pt")
    assert not (tmp_path / "ran").exists()


def test_a_path_that_is_none(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "nothing", tmp_path / "file", tmp_path):
        with pytest.raises(CheckpointError) as caught:
            Checkpoint(path)
        says(caught.value, "a checkpoint")


def test_the_same_name_again_replaces_in_one_move(tmp_path):
    write(tmp_path / "x.ckpt", 1)
    seen, stop = [], threading.Event()

    def look():
        while not stop.is_set():
            seen.append(Checkpoint(tmp_path / "x.ckpt").summary["global_step"])

    thread = threading.Thread(target=look)
    thread.start()
    for value in range(2, 12):
        write(tmp_path / "x.ckpt", value)
    stop.set()
    thread.join()
    assert set(seen) <= set(range(1, 12))
    assert Checkpoint(tmp_path / "x.ckpt").summary == {"global_step": 11}
    assert names(tmp_path) == ["x.ckpt"]


def test_a_folder_that_cannot_be_written_leaves_the_last_good_one(tmp_path):
    """A full disk looks the same: an OSError in the middle of a section."""
    import resource

    write(tmp_path / "x.ckpt")
    draft = Draft(tmp_path / "x.ckpt")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises((OSError, RuntimeError)):
            draft.write("module.pt", {"w": torch.zeros(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    draft.abandon()
    Checkpoint(tmp_path / "x.ckpt").verify()
    assert names(tmp_path) == ["x.ckpt"]


KILLED = """
import sys, torch
from pathlib import Path
from xtrain.checkpoint.format import Draft
step = int(sys.argv[2])
while True:
    step += 1
    draft = Draft(Path(sys.argv[1]) / f"{step}.ckpt")
    draft.write("module.pt", {"w": torch.full((100_000,), float(step))})
    draft.finish({"global_step": step})
    print(step, flush=True)
"""


def test_killed_at_any_moment(tmp_path):
    """Nothing torn, nothing lost that was announced; what a dead process left is removed by the next save."""
    announced = 0
    for round_ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path), str(100 * round_)], stdout=subprocess.PIPE, text=True
        )
        announced = int(child.stdout.readline())
        time.sleep(0.05 * round_)
        child.kill()
        announced = ([announced, *map(int, child.stdout.read().split())])[-1]
        child.stdout.close()
        child.wait()
        newest = checkpoints_in(tmp_path)[0]
        newest.verify()
        assert newest.summary["global_step"] >= announced
    for path in tmp_path.glob(".tmp-*"):
        os.utime(path, (0, 0))  # one that was cut off as it began or ended has no owner, and is given a minute
    write(tmp_path / "last.ckpt")
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_save_that_goes_on_elsewhere_is_left_alone(tmp_path):
    draft = Draft(tmp_path / "x.ckpt")
    remove_leftovers(tmp_path)
    draft.write("module.pt", {})
    code = "import sys; from pathlib import Path; from xtrain.checkpoint.disk import remove_leftovers; "
    code += "remove_leftovers(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    draft.finish({})
    Checkpoint(tmp_path / "x.ckpt").verify()
    Disk().remove(tmp_path / "x.ckpt")
    assert names(tmp_path) == []


def test_a_lock_is_seen_by_threads_and_processes(tmp_path):
    lock = Lock(tmp_path / "lock")
    assert lock.take()
    assert not Lock(tmp_path / "lock").take()
    code = "import sys; from pathlib import Path; from xtrain.checkpoint.locks import Lock; "
    code += "lock = Lock(Path(sys.argv[1])); print(lock.take(), lock.owner())"
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    assert subprocess.run(command, capture_output=True, text=True).stdout == f"False {os.getpid()}\n"
    lock.release()
    assert subprocess.run(command, capture_output=True, text=True).stdout.startswith("True")
    assert json.loads((tmp_path / "lock").read_text()) != os.getpid()
