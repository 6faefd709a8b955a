"""Checkpoints in a file system of fsspec that has no moves: whole or not picked, and used like those on a disk."""

from __future__ import annotations

import json
from functools import partial

import fsspec
import pytest
import torch
from shelf import Shelf, set_up, train_with_a_full_shelf
from small import Small, loader, says, trainer

from xtrain import CheckpointError, ConfigurationError, MissingDependencyError, ModelCheckpoint
from xtrain.checkpoint import digests
from xtrain.checkpoint.format import Checkpoint, Draft, checkpoints_in
from xtrain.checkpoint.places import Remote, place
from xtrain.cli.command import main
from xtrain.loggers import CSVLogger
from xtrain.testing.ranks import Ranks


@pytest.fixture
def shelf(tmp_path):
    set_up()
    return f"shelf://{tmp_path}/run"


class Adam(Small):
    def validation_step(self, batch, batch_idx):
        self.log("score", float(self.current_epoch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


def fit(folder, steps, ckpt_path=None, **options):
    module, saver = Adam(), ModelCheckpoint(folder, **{"every_n_train_steps": 2, "save_top_k": -1, **options})
    one = trainer(max_steps=steps, callbacks=[saver])
    one.fit(module, loader(), loader(1), ckpt_path=ckpt_path)
    return module, saver


@pytest.mark.parametrize("where", ["shelf", "memory://a/run"])
def test_a_run_goes_on_from_there(shelf, where, tmp_path):
    whole, _ = fit(tmp_path / "whole", 10)
    folder = shelf if where == "shelf" else where
    for stop in (3, 7, 10):  # saved after 2 and 6
        part, saver = fit(folder, stop, "last", save_last=True, background=stop == 7)
    assert torch.equal(part.net.weight, whole.net.weight)
    assert saver.best_model_path.startswith(folder)
    found = [c.path.name for c in checkpoints_in(folder)]
    assert found[:2] == ["epoch=2-step=10.ckpt", "last.ckpt"]
    assert Checkpoint(f"{folder}/last.ckpt").summary["global_step"] == 10
    again = Adam.load_from_checkpoint(f"{folder}/last.ckpt")
    assert torch.equal(again.net.weight, whole.net.weight)
    assert not place(f"{folder}/.lock").exists()


def test_the_trainers_folder_and_the_verbs(shelf, tmp_path, capsys):
    one = trainer(default_root_dir=shelf, enable_checkpointing=True)
    one.fit(Adam(), loader(), loader(1))
    path = f"{shelf}/checkpoints/epoch=1-step=4.ckpt"
    assert one.checkpoint_callback.best_model_path == path
    one.validate(Adam(), loader(1), ckpt_path="best")
    one.save_checkpoint(f"{shelf}/mine.ckpt")
    one.save_checkpoint(f"{shelf}/mine.ckpt")  # again
    assert main(["inspect", f"{shelf}/checkpoints"]) == 0
    assert "Adam, 4 steps" in capsys.readouterr().out
    assert main(["export", path, "--out", str(tmp_path / "m.safetensors")]) == 0
    assert main(["export", path, "--out", f"{shelf}/m.safetensors"]) == 1
    says(CheckpointError(capsys.readouterr().err), "a file of this machine", "--out model.safetensors")


def test_only_the_best_are_kept(shelf):
    fit(shelf, 12, monitor="score", mode="max", every_n_train_steps=None, every_n_epochs=1, save_top_k=1)
    assert [c.path.name for c in checkpoints_in(shelf)] == ["epoch=3-step=12.ckpt"]
    assert list(place(shelf).sizes()) == ["epoch=3-step=12.ckpt"]


def test_a_save_that_died_is_not_picked_and_goes_away(shelf):
    fit(shelf, 2)
    draft = Draft(place(f"{shelf}/epoch=1-step=4.ckpt"))
    draft.write("module.pt", {"w": torch.ones(2)})
    assert [c.path.name for c in checkpoints_in(shelf)] == ["epoch=0-step=2.ckpt"]
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        fit(shelf, 2, f"{shelf}/epoch=1-step=4.ckpt")
    _, saver = fit(shelf, 6, "last")
    assert saver.best_model_path.endswith("epoch=1-step=6.ckpt")
    assert sorted(place(shelf).sizes()) == ["epoch=0-step=2.ckpt", "epoch=1-step=4.ckpt", "epoch=1-step=6.ckpt"]


def test_foreign_folders_are_left_alone(shelf, tmp_path):
    one = trainer()
    one.fit(Adam(), loader())
    (tmp_path / "run" / "x.ckpt").mkdir(parents=True)
    (tmp_path / "run" / "x.ckpt" / "data").write_text("mine")
    for where in (f"{shelf}/x.ckpt", tmp_path / "run" / "x.ckpt"):
        with pytest.raises(CheckpointError) as caught:
            one.save_checkpoint(where)
        says(caught.value, "a folder with other things in it", "save_checkpoint('model.ckpt')")
    assert (tmp_path / "run" / "x.ckpt" / "data").read_text() == "mine"


def test_a_writer_in_the_background_that_fails_on_one_process_is_told_and_left_out_on_all(shelf):
    ranks = Ranks(2)
    try:
        found = {
            full: ranks.run(partial(train_with_a_full_shelf, shelf, full)) for full in ("rank-00001.pt", "module.pt")
        }
    finally:
        ranks.close()
    for full, answers in found.items():
        path = f"{shelf}/epoch=3-step=6{'-v1' * (full == 'module.pt')}.ckpt"
        assert [best for best, _ in answers] == [path, path]
        assert sum("no credit left" in text for text in answers[0][1]) == 2, answers  # once for each of two saves
    assert list(place(shelf).sizes()) == ["epoch=3-step=6-v1.ckpt", "epoch=3-step=6.ckpt"]


def test_what_cannot_be_written_is_told_and_the_training_goes_on(shelf, monkeypatch):
    fit(shelf, 2)
    monkeypatch.setattr(Shelf, "full", "optimizer-0.pt")
    with pytest.warns(UserWarning, match=r"goes on without this checkpoint[\s\S]*no credit left"):
        module, _ = fit(shelf, 4, "last")
    assert module.trainer.global_step == 4
    assert [c.path.name for c in checkpoints_in(shelf)] == ["epoch=0-step=2.ckpt"]
    assert list(place(shelf).sizes()) == ["epoch=0-step=2.ckpt"]


def test_damage_is_noticed(shelf, tmp_path):
    fit(shelf, 2)
    file = tmp_path / "run" / "epoch=0-step=2.ckpt" / "module.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"module\.pt with other bytes"):
        Adam.load_from_checkpoint(f"{shelf}/epoch=0-step=2.ckpt")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"the file module\.pt in shelf://"):
        Adam.load_from_checkpoint(f"{shelf}/epoch=0-step=2.ckpt")


def test_an_earlier_run_is_told_that_another_has_begun_there(shelf):
    class Other(ModelCheckpoint):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 2:
                place(f"{shelf}/.lock").write_text("process 7 of elsewhere, abc")

    saver = Other(shelf, every_n_train_steps=2, save_top_k=-1)
    with pytest.warns(UserWarning, match=r"by one run[\s\S]*process 7 of elsewhere"):
        trainer(max_steps=4, callbacks=[saver]).fit(Adam(), loader())
    assert [c.path.name for c in checkpoints_in(shelf)] == ["epoch=0-step=2.ckpt"]
    assert place(f"{shelf}/.lock").read_text() == "process 7 of elsewhere, abc"


def test_checksums_on_the_way_are_those_of_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(digests, "BLOCK", 100)
    for count in (0, 1, 99, 100, 101, 300, 350):
        data = bytes(i % 251 for i in range(count))
        with (tmp_path / "x").open("wb") as file:
            writer = digests.Digesting(file)
            for at in range(0, count, 70):
                writer.write(data[at : at + 70])
            facts = writer.facts()
        assert facts == {"bytes": count, "sha256": digests.sha256_of(tmp_path, {"x": count})["x"]}


def test_places():
    assert [str(place(p)) for p in ("memory://", "memory://a/", "file:///tmp/x", "x")] == [
        "memory://", "memory://a", "/tmp/x", "x"
    ]  # fmt: skip
    there = Remote("s3://bucket/run") / "x.ckpt"
    assert (str(there), there.name, there.stem, there.suffix) == ("s3://bucket/run/x.ckpt", "x.ckpt", "x", ".ckpt")
    assert str(there.parent) == "s3://bucket/run"
    assert str(Remote("memory://") / "run") == "memory://run"


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("s3:/bucket/run", ("a pathlib.Path has changed", "'s3://bucket/run' as a str")),
        ("nosuch://bucket/run", ("a URL that fsspec opens", "s3://bucket/runs")),
        ("absent://bucket/run", ("the package that opens absent://bucket/run", "pip install absentfs")),
    ],
)
def test_urls_that_cannot_be_opened(path, parts):
    fsspec.register_implementation("absent", "absentfs.Absent", clobber=True, errtxt="Install absentfs to open that")
    with pytest.raises((CheckpointError, ConfigurationError)) as caught:
        trainer().fit(Adam(), loader(), ckpt_path=path)
    says(caught.value, *parts)
    with pytest.raises((ConfigurationError, MissingDependencyError)):
        Adam.load_from_checkpoint(path)


def test_loggers_stay_on_this_machine(shelf):
    for make in (lambda: CSVLogger(shelf), lambda: trainer(default_root_dir=shelf, logger=True)):
        with pytest.raises(ConfigurationError) as caught:
            make()
        says(caught.value, "a folder of this machine as save_dir", "CSVLogger('logs'")


def test_the_manifest_is_the_same_format(shelf, tmp_path):
    fit(shelf, 2)
    manifest = json.loads((tmp_path / "run" / "epoch=0-step=2.ckpt" / "manifest.json").read_text())
    assert manifest["schema"] == 1
    assert set(manifest["files"]) == {p.name for p in (tmp_path / "run" / "epoch=0-step=2.ckpt").iterdir()} - {
        "manifest.json"
    }
