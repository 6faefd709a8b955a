"""What users do with checkpoints: callbacks that keep the best, hooks, partial loads, export; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from small import Small, loader, net, rows, says, trainer
from test_checkpoint_format import Payload
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from xtrain import (
    Callback,
    CheckpointError,
    ConfigurationError,
    LightningDataModule,
    ModelCheckpoint,
    ProtocolError,
)
from xtrain.checkpoint.digests import sha256_of
from xtrain.checkpoint.format import Checkpoint, checkpoints_in, digest_of
from xtrain.cli.command import main


class Scored(Small):
    """Logs a score that was given for each epoch."""

    def __init__(self, scores=(3.0, 1.0, 2.0, 0.5, 4.0)):
        super().__init__()
        self.scores = scores
        self.save_hyperparameters()

    def validation_step(self, batch, batch_idx):
        self.log("score", self.scores[self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


def fit(folder, module=None, ckpt_path=None, load=None, epochs=5, loaders=None, **options):
    module, saver = module or Scored(), options.pop("saver", None) or ModelCheckpoint(folder)
    run = trainer(max_epochs=epochs, callbacks=[saver, *options.pop("callbacks", [])], **options)
    run.fit(module, loaders or loader(), loader(1), ckpt_path=ckpt_path, load=load)
    return module, run


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir() if not path.name.startswith("."))


# -------------------------------------------------------------------- which are kept


def test_by_default_the_newest_is_kept(tmp_path):
    fit(tmp_path)
    assert names(tmp_path) == ["epoch=5-step=20.ckpt"]


def test_the_best_are_kept(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{epoch}-{score:.1f}", monitor="score", save_top_k=2, save_last=True)
    fit(tmp_path, saver=saver)
    assert names(tmp_path) == [
        "epoch=2-score=1.0.ckpt",
        "epoch=4-score=0.5.ckpt",
        "epoch=5-score=4.0.ckpt",
        "last.ckpt",
    ]
    assert saver.best_model_path == str(tmp_path / "epoch=4-score=0.5.ckpt")
    assert saver.best_model_score == 0.5
    assert (tmp_path / "last.ckpt").readlink() == Path("epoch=5-score=4.0.ckpt")
    best = trainer(callbacks=[saver], max_epochs=1)
    best.validate(Scored(), loader(1), ckpt_path="best")
    assert torch.equal(
        best.lightning_module.net.weight, Checkpoint(saver.best_model_path).read("module.pt")["net.weight"]
    )


def test_the_largest_may_be_the_best(tmp_path):
    fit(tmp_path, saver=ModelCheckpoint(tmp_path, monitor="score", mode="max"))
    assert names(tmp_path) == ["epoch=5-step=20.ckpt"]


def test_steps_are_training_steps(tmp_path):
    fit(tmp_path, saver=ModelCheckpoint(tmp_path, "{step:03d}", every_n_train_steps=3, save_top_k=-1), epochs=2)
    assert names(tmp_path) == ["step=003.ckpt", "step=006.ckpt"]
    assert [c.summary["batches"] for c in reversed(checkpoints_in(tmp_path))] == [3, 2]


def test_an_existing_name_is_never_overwritten(tmp_path):
    for _ in range(2):
        fit(tmp_path, saver=ModelCheckpoint(tmp_path, "model", save_top_k=-1), epochs=1)
    assert names(tmp_path) == ["model-v1.ckpt", "model.ckpt"]


def test_a_name_may_be_replaced(tmp_path):
    for _ in range(2):
        fit(tmp_path, saver=ModelCheckpoint(tmp_path, "m-{score:d}", enable_version_counter=False), epochs=3)
    assert names(tmp_path) == ["m-score=2.ckpt"]


def test_weights_alone_are_no_training_to_go_on_with(tmp_path):
    first, run = fit(tmp_path, saver=ModelCheckpoint(tmp_path, save_weights_only=True), epochs=1)
    with pytest.raises(CheckpointError) as caught:
        fit(tmp_path, ckpt_path="last")
    says(caught.value, "saved with weights alone", "load=('module',)")
    again = trainer(max_epochs=0)
    again.fit(module := Scored(), loader(), ckpt_path=run.checkpoint_callback.best_model_path, load=("module",))
    assert torch.equal(module.net.weight, first.net.weight)


@pytest.mark.parametrize("path", [3, ""])
def test_what_is_no_path(path, tmp_path):
    with pytest.raises(ConfigurationError) as caught:
        fit(tmp_path, ckpt_path=path)
    says(caught.value, "a path, or a URL, as text")


def test_nothing_is_written_that_nobody_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer().fit(Scored(), loader())
    assert names(tmp_path) == []
    trainer(enable_checkpointing=True).fit(Scored(), loader())
    assert names(tmp_path / "checkpoints") == ["epoch=1-step=4.ckpt"]
    trainer(enable_checkpointing=True, fast_dev_run=True, default_root_dir=tmp_path / "quick").fit(Scored(), loader())
    assert not (tmp_path / "quick" / "checkpoints").exists() or names(tmp_path / "quick" / "checkpoints") == []


def test_in_the_background_the_same_is_written(tmp_path):
    for background in (False, True):
        saver = ModelCheckpoint(tmp_path / str(background), save_top_k=-1, background=background)
        fit(tmp_path, saver=saver)
        assert len(saver.best_k_models) == 5
    one, other = (checkpoints_in(tmp_path / str(b))[0] for b in (False, True))
    other.verify()
    for name in ("module.pt", "optimizer-0.pt"):
        assert one.files[name]["sha256"] == other.files[name]["sha256"]


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "best"},
        {"save_top_k": -2},
        {"save_top_k": 2},
        {"every_n_epochs": -1},
        {"every_n_train_steps": 1.5},
        {"train_time_interval": 30},
        {"filename": 3},
        {"filename": "{score:q}"},
        {"save_last": "yes"},
    ],
)
def test_arguments_that_mean_nothing(options):
    with pytest.raises(ConfigurationError) as caught:
        ModelCheckpoint(**options)
    says(caught.value, "ModelCheckpoint(")


def test_a_monitor_that_is_not_logged(tmp_path):
    with pytest.raises(ConfigurationError) as caught:
        fit(tmp_path, saver=ModelCheckpoint(tmp_path, monitor="loss"))
    says(caught.value, "'loss' of ModelCheckpoint", "score")


# -------------------------------------------------------------------- hooks, callbacks, DataModules


class Counts(Callback):
    """Counts batches, also over checkpoints."""

    def __init__(self):
        self.count = 0

    def on_train_batch_end(self, *_):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Numbers(LightningDataModule):
    cursor = 0

    def train_dataloader(self):
        return loader()

    def state_dict(self):
        return {"cursor": 7}

    def load_state_dict(self, state_dict):
        self.cursor = state_dict["cursor"]


class Hooked(Scored):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = {"epoch": checkpoint["epoch"]}

    def on_load_checkpoint(self, checkpoint):
        self.found = checkpoint["mine"]
        checkpoint["optimizer_states"]["optimizer0"]["groups"][0]["lr"] = 0.001


def test_callbacks_hooks_and_datamodule_are_part_of_it(tmp_path):
    run = trainer(max_epochs=2, callbacks=[ModelCheckpoint(tmp_path), Counts()])
    run.fit(Hooked(), datamodule=Numbers())
    counts, data, module = Counts(), Numbers(), Hooked()
    again = trainer(max_epochs=3, callbacks=[ModelCheckpoint(tmp_path), counts])
    again.fit(module, datamodule=data, ckpt_path="last")
    assert counts.count == 12
    assert data.cursor == 7
    assert module.found == {"epoch": 2}
    assert again.life.optimizers[0].param_groups[0]["lr"] == 0.001  # another learning rate, by the hook


class Foreign(Callback):
    def on_save_checkpoint(self, trainer, module, checkpoint):
        checkpoint["mine"] = {"path": Path("x")}


def test_a_hook_that_adds_what_cannot_be_read_back(tmp_path):
    run = trainer(callbacks=[Foreign()])
    run.fit(Scored(), loader())
    with pytest.raises(CheckpointError) as caught:
        run.save_checkpoint(tmp_path / "x.ckpt")
    says(caught.value, "checkpoint['mine'], added by Foreign.on_save_checkpoint['path']", "str(path)")
    assert names(tmp_path) == []
    with pytest.warns(UserWarning, match="The training goes on without this checkpoint.*Foreign"):
        fit(tmp_path, callbacks=[Foreign()], epochs=1)


# -------------------------------------------------------------------- what is loaded


def test_a_module_without_a_trainer(tmp_path):
    module, _ = fit(tmp_path, Scored((5.0, 6.0)), epochs=2)
    path = checkpoints_in(tmp_path)[0].path
    again = Scored.load_from_checkpoint(path)
    assert again.scores == (5.0, 6.0)
    assert torch.equal(again.net.weight, module.net.weight)
    assert Scored.load_from_checkpoint(path, scores=(1.0,)).scores == (1.0,)


class Wider(Scored):
    """The same with a layer more, and another optimizer."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(3, 2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_another_module_is_refused_and_loaded_in_part(tmp_path, caplog):
    first, _ = fit(tmp_path, epochs=2)
    with pytest.raises(CheckpointError) as caught:
        fit(tmp_path, Wider(), "last")
    says(caught.value, "no extra.weight (and 1 more differences)", "load=(")
    module = Wider()
    run = trainer(max_epochs=2, callbacks=[])
    with pytest.warns(UserWarning, match="max_epochs=2, reached"):
        run.fit(module, loader(), ckpt_path=checkpoints_in(tmp_path)[0].path, load=("module", "optimizers", "data"))
    assert torch.equal(module.net.weight, first.net.weight)
    assert run.global_step == 8
    for part in ("no extra.weight", "no extra.bias", "optimizer 'optimizer0' (Adam)"):
        assert part in caplog.text


def test_parts_that_there_are_not(tmp_path):
    with pytest.raises(ConfigurationError) as caught:
        trainer().fit(Scored(), loader(), ckpt_path="last", load=("weights",))
    says(caught.value, "'optimizers'", "weights")
    with pytest.raises(ConfigurationError) as caught:
        trainer().fit(Scored(), loader(), load=("module",))
    says(caught.value, "a ckpt_path to load parts of")


def test_groups_that_differ_are_named(tmp_path):
    class Grouped(Scored):
        def configure_optimizers(self):
            return torch.optim.Adam([{"params": [self.net.bias]}, {"params": [self.net.weight]}], lr=0.1)

    fit(tmp_path, epochs=1)
    with pytest.raises(CheckpointError) as caught:
        fit(tmp_path, Grouped(), "last")
    says(caught.value, "optimizer 'optimizer0' as it was saved: number of groups 1", "number of groups 2")


# -------------------------------------------------------------------- what is refused


def forge(path, name, content):
    """Put a file into a checkpoint, with a manifest to which it belongs, as somebody hostile can."""
    torch.save(content, path / name)
    manifest = json.loads((path / "manifest.json").read_text())
    size = (path / name).stat().st_size
    manifest["files"][name] = {"bytes": size, "sha256": sha256_of(path, {name: size})[name]}
    manifest["sha256"] = digest_of({key: value for key, value in manifest.items() if key != "sha256"})
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["module.pt", "optimizer-0.pt", "training.pt", "rank-00000.pt", "shard-00000.pt"])
def test_hostile_sections_run_nothing(tmp_path, name):
    fit(tmp_path / "c", epochs=1)
    path = checkpoints_in(tmp_path / "c")[0].path
    torch.save({"name": "optimizer0", "x": Payload(tmp_path / "ran")}, path / name)
    if name != "shard-00000.pt":
        with pytest.raises(CheckpointError, match="bytes"):  # its size and its sum do not fit
            fit(tmp_path, ckpt_path=path)
    forge(path, name, {"name": "optimizer0", "x": Payload(tmp_path / "ran")})
    for use in (lambda: fit(tmp_path, ckpt_path=path), lambda: Scored.load_from_checkpoint(path)):
        with pytest.raises(CheckpointError) as caught:
            use()
        says(caught.value, "tensors and plain values", name)
    assert main(["export", str(path), "--out", str(tmp_path / "m.safetensors")]) == 1
    assert not (tmp_path / "ran").exists()


def test_last_begins_afresh_and_a_path_must_be_one(tmp_path):
    _, run = fit(tmp_path / "new", ckpt_path="last", epochs=1)
    assert run.global_step == 4
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nothing.ckpt"):
        with pytest.raises(CheckpointError) as caught:
            fit(tmp_path / "other", ckpt_path=path)
        says(caught.value, str(path))
    with pytest.raises(CheckpointError) as caught:
        fit(tmp_path / "other", ckpt_path="best")
    says(caught.value, "ModelCheckpoint(monitor=")


def test_last_passes_over_a_damaged_one(tmp_path):
    fit(tmp_path, saver=ModelCheckpoint(tmp_path, save_top_k=-1), epochs=2)
    newest = checkpoints_in(tmp_path)[0].path
    data = bytearray((newest / "module.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "module.pt").write_bytes(data)
    with pytest.warns(UserWarning, match="passed over"):
        _, run = fit(tmp_path, saver=ModelCheckpoint(tmp_path, save_top_k=-1), ckpt_path="last", epochs=3)
    assert run.global_step == 12


class ReadOnly(Callback):
    """The disk goes away in the second epoch."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            shutil.rmtree(self.folder)
            self.folder.write_text("a file where the folder was")


def test_a_folder_that_cannot_be_written_warns_and_training_goes_on(tmp_path):
    with pytest.warns(UserWarning, match="The training goes on without this checkpoint"):
        _, run = fit(tmp_path / "c", callbacks=[ReadOnly(tmp_path / "c")], epochs=2)
    assert run.global_step == 8


class Again(Callback):
    """Starts another run into the same folder."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, module):
        with pytest.raises(CheckpointError) as caught:
            fit(self.folder, epochs=1)
        says(caught.value, "written to by one run")


def test_two_runs_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("xtrain.checkpoint.locks.PATIENCE", 0.2)
    fit(tmp_path, callbacks=[Again(tmp_path)], epochs=1)


def test_a_save_before_any_run():
    with pytest.raises(ProtocolError) as caught:
        trainer().save_checkpoint("x.ckpt")
    says(caught.value, "trainer.fit(model)")


def test_an_iterator_is_told_before_training(tmp_path):
    with pytest.warns(UserWarning, match="a loader whose position a checkpoint can keep"):
        fit(tmp_path, loaders=iter([rows(2)] * 4), epochs=1)


def test_a_sampler_with_an_order_of_its_own_goes_on(tmp_path):
    """Its generator is put back to where the order was drawn."""

    def run(stop, ckpt_path=None):
        module = Small()
        generator = torch.Generator().manual_seed(5)
        data = DataLoader(rows(8), 2, sampler=RandomSampler(rows(8), replacement=True, generator=generator))
        one = trainer(max_steps=stop, callbacks=[ModelCheckpoint(tmp_path / str(bool(ckpt_path)))])
        one.fit(module, data, ckpt_path=ckpt_path)
        return module.net.weight

    whole = run(10)
    for stop in (3, 6, 10):
        part = run(stop, "last")
    assert torch.equal(part, whole)


class Fails(Callback):
    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == 6:
            raise KeyError("on purpose")


def test_an_exception_is_saved_for_looking_at_and_passed_over(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_on_exception=True)
    with pytest.raises(KeyError):
        fit(tmp_path, saver=saver, callbacks=[Fails()])
    assert names(tmp_path) == ["epoch=1-step=4.ckpt", "exception-epoch=1-step=6.ckpt"]
    _, run = fit(tmp_path, ckpt_path="last", epochs=2)
    assert run.global_step == 8


# -------------------------------------------------------------------- the commands


def test_inspect_and_export(tmp_path, capsys):
    module, _ = fit(tmp_path / "c", epochs=2)
    assert main(["inspect", str(tmp_path / "c")]) == 0
    text = capsys.readouterr().out
    for part in ("global step", "8", "optimizer optimizer0", "Adam, 8 steps", "backend", "cpu", "module.pt"):
        assert part in text
    assert main(["export", str(tmp_path / "c"), "--out", str(tmp_path / "m.safetensors")]) == 0
    from safetensors.torch import load_file

    plain = net(1)  # three lines without xtrain
    plain.load_state_dict({k.removeprefix("net."): v for k, v in load_file(tmp_path / "m.safetensors").items()})
    assert torch.equal(plain.weight, module.net.weight)
    assert main(["inspect", str(tmp_path / "nothing")]) == 1
    assert "Expected" in capsys.readouterr().err
