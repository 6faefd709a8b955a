"""What ranks hold in shards they write themselves, and any number of processes on any backend reads it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from functools import partial

import pytest
import segments
import torch
from segments import PARTITIONED, STEPS, Model

from xtrain import CheckpointError
from xtrain.checkpoint.exporting import export
from xtrain.checkpoint.format import Checkpoint, checkpoints_in
from xtrain.checkpoint.parts import Assembler, Part, Splitter
from xtrain.testing.ranks import Ranks

BACKENDS = {"fsdp": {}, "deepspeed": {"stage": 3, "config": PARTITIONED}}
HERE = [name for name in BACKENDS if name == "fsdp" or importlib.util.find_spec("deepspeed")]
WORLDS = (2, 3, 1, 2)


@pytest.fixture(scope="module")
def processes():
    made = {count: Ranks(count, segments.prepare) for count in set(WORLDS)}
    yield made
    for ranks in made.values():
        ranks.close()


def train(processes, count, backend, folder, stop):
    options = BACKENDS.get(backend, {})
    return processes[count].run(partial(segments.train, backend, options, "32-true", str(folder), stop))[0]


@pytest.mark.parametrize("backend", HERE)
def test_every_rank_writes_and_any_number_reads(processes, tmp_path, backend):
    expected, counts = train(processes, 1, "cpu", tmp_path / "whole", STEPS[-1])
    for count, stop in zip(WORLDS, STEPS, strict=True):
        state, found = train(processes, count, backend, tmp_path / "c", stop)
        newest = checkpoints_in(tmp_path / "c")[0]
        assert sum(name.startswith("shard-") for name in newest.files) == count
        held = [newest.read(f"shard-{rank:05d}.pt") for rank in range(count)]
        keys = [key for key in held[0] if "G.weight" in key]
        states = [f"optimizer-0.pt/state/G.weight/{key}" for key in ("exp_avg", "exp_avg_sq")]
        assert sorted(keys) == ["module.pt/G.weight", *states]
        for key in keys:  # each number is written once
            assert sum(shard[key][1].numel() for shard in held) == 35
    assert found == counts
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def sharded(processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    state, _ = train(processes, 2, "fsdp", folder, STEPS[0])
    return checkpoints_in(folder)[0].path, state


def test_it_is_read_without_processes(sharded, tmp_path):
    path, state = sharded
    module = Model.load_from_checkpoint(path)
    assert export(path, tmp_path / "m.safetensors") == len(state)
    from safetensors.torch import load_file

    exported = load_file(tmp_path / "m.safetensors")
    for name, value in state.items():
        assert torch.equal(module.state_dict()[name], value)
        assert torch.equal(exported[name], value)


def test_a_missing_shard_is_named(sharded, tmp_path):
    path = tmp_path / "x.ckpt"
    shutil.copytree(sharded[0], path)
    (path / "shard-00001.pt").unlink()
    with pytest.raises(CheckpointError, match=r"the file shard-00001\.pt in .*x\.ckpt"):
        Model.load_from_checkpoint(path)


def test_a_flipped_bit_in_a_shard_is_named(sharded, tmp_path):
    path = tmp_path / "x.ckpt"
    shutil.copytree(sharded[0], path)
    data = bytearray((path / "shard-00001.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "shard-00001.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"shard-00001\.pt with other bytes"):
        Model.load_from_checkpoint(path)


def test_the_manifest_has_a_sum_of_every_shard(sharded):
    files = json.loads((sharded[0] / "manifest.json").read_text())["files"]
    for name in ("shard-00000.pt", "shard-00001.pt"):
        assert [len(digest) for digest in files[name]["sha256"]] == [64]
    Checkpoint(sharded[0]).verify()


def test_parts_that_do_not_make_a_whole_are_refused():
    splitter = Splitter()
    part = Part(torch.arange(3.0), 0, (2, 3))
    content = splitter.split({"a": part, "b": [part], "c": torch.ones(1)}, "module.pt")
    assert list(splitter.shard) == ["module.pt/a"]  # ties are one part
    other = {"module.pt/a": (3, torch.arange(3.0, 6.0))}
    whole = Assembler({"shard-00000.pt": splitter.shard, "shard-00001.pt": other})(content)
    assert torch.equal(whole["b"][0], torch.arange(6.0).view(2, 3))
    with pytest.raises(CheckpointError, match=r"6 numbers of module\.pt/a"):
        Assembler({"shard-00000.pt": splitter.shard})(content)["a"]
