"""Where batches come from (loaders, any iterable, a DataModule, nothing) and how they reach the step."""

from __future__ import annotations

import itertools
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from small import Small, loader, rows, says, trained, trainer
from torch import Tensor

from xtrain import ConfigurationError, LightningDataModule

# ---------------------------------------------------------------- from what


def generator(count=4):
    return (rows(2, seed) for seed in range(count))


class Unsized:
    """An iterable without a length that can be read again."""

    def __iter__(self):
        return generator()


class UnknownLength(Unsized):
    def __len__(self):
        raise NotImplementedError


class LastBatches(Small):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.seen[-1] = (batch_idx, self.trainer.is_last_batch)


SOURCES = [loader(), list(loader()), Unsized(), UnknownLength(), generator(), tuple(generator())]
FOUR = [(0, False), (1, False), (2, False), (3, True)]


@pytest.mark.parametrize("source", SOURCES)
def test_is_last_batch(source):
    assert trained(source, LastBatches())[0].seen == FOUR


@pytest.mark.parametrize("source", [loader(9), Unsized(), itertools.repeat(rows(2)), generator(9)])
def test_is_last_batch_under_a_limit(source):
    assert trained(source, LastBatches(), limit_train_batches=4)[0].seen == FOUR


def test_is_last_batch_with_steps():
    seen = trained(loader(3), LastBatches(), steps=4, max_epochs=-1)[0].seen
    assert seen == [(0, False), (1, False), (2, True), (0, True)]


def test_a_sized_loader_is_never_read_ahead():
    """Reading ahead would block on data that the current step produces, as in reinforcement learning."""

    class Replay:
        def __init__(self, module):
            self.module = module

        def __len__(self):
            return 3

        def __iter__(self):
            for index in range(3):
                assert len(self.module.seen) == index
                yield rows(2)

    module = Small()
    trained(Replay(module), module)
    assert module.seen == [0, 1, 2]


@pytest.mark.parametrize(("source", "count"), [(loader(3), 3), ([rows(2)] * 5, 5), (Unsized(), float("inf"))])
def test_num_training_batches(source, count):
    assert trained(source)[1].num_training_batches == count


def test_unsized_loader_restarts_each_epoch():
    assert trained(Unsized(), max_epochs=2)[0].seen == [0, 1, 2, 3] * 2


def test_loader_of_the_module():
    class Own(Small):
        def train_dataloader(self):
            return loader(2)

        def val_dataloader(self):
            return [loader(1)]

        def validation_step(self, batch, batch_idx):
            self.seen.append("val")

    assert trained(None, Own(), num_sanity_val_steps=0)[0].seen == [0, 1, "val"]


@pytest.mark.parametrize(
    ("options", "steps", "seen", "epochs"),
    [
        ({"max_epochs": None}, 3, [0, 1, 2], 1),
        ({"max_steps": 3}, None, [0, 1, 2], 1),
        ({"max_steps": 2}, 3, [0, 1], 1),
        ({"max_steps": 5, "limit_train_batches": 2}, None, [0, 1, 0, 1, 0], 3),
        ({"fast_dev_run": 2, "max_steps": 9}, None, [0, 1], 1),
        ({"fast_dev_run": True, "max_steps": 9}, None, [0], 1),
    ],
)
def test_without_a_loader(options, steps, seen, epochs):
    module, run = trained(None, steps=steps, **options)
    assert module.seen == seen
    assert run.current_epoch == epochs


def test_without_a_loader_the_batch_is_none():
    class Simulation(Small):
        def training_step(self, batch, batch_idx):
            self.seen.append((batch, self.trainer.is_last_batch))

    assert trained(None, Simulation(), steps=2)[0].seen == [(None, False), (None, True)]


@pytest.mark.parametrize("options", [{}, {"fast_dev_run": True}, {"limit_train_batches": 2}])
def test_neither_loader_nor_steps(options):
    with pytest.raises(ConfigurationError) as caught:
        trained(None, **options)
    says(caught.value, "trainer.fit(model, steps=1000)")


def test_a_batch_of_none_trains_nothing_and_is_told():
    class Ends(Small):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.seen.append((outputs, batch is None))

    with pytest.warns(UserWarning, match="None, which trains nothing"):
        module, run = trained([rows(2), None, rows(2), None], Ends())
    assert module.seen == [0, ({}, False), (None, True), 2, ({}, False), (None, True)]
    assert run.global_step == 2


# ---------------------------------------------------------------- what a step gets


@dataclass
class Pair:
    x: Tensor
    y: Tensor
    label: str = "kept"


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("batch", "read"),
    [
        ({"x": rows(2), "y": "text"}, lambda b: (b["x"], b["y"])),
        (Point(rows(2), "text"), lambda b: (b.x, b.y)),
        (Pair(rows(2), rows(2), "text"), lambda b: (b.x, b.label)),
        ((rows(2), "text"), lambda b: (b[0], b[1])),
        ({"deep": [Point(rows(2), 0), "text"]}, lambda b: (b["deep"][0].x, b["deep"][1])),
    ],
    ids=["dict", "namedtuple", "dataclass", "tuple", "nested"],
)
def test_batches_keep_their_type(batch, read):
    class Reading(Small):
        def training_step(self, received, batch_idx):
            assert type(received) is type(batch)
            x, rest = read(received)
            assert (x.dtype, rest) == (torch.bfloat16, "text")
            super().training_step(x, batch_idx)

    assert trained([batch] * 2, Reading(), precision="bf16-true")[0].seen == [0, 1]


def test_step_with_fewer_arguments():
    class OnlyBatch(Small):
        def training_step(self, batch):
            Small.training_step(self, batch, 7)

    class Nothing(Small):
        def training_step(self):
            Small.training_step(self, None, 7)

    for kind in (OnlyBatch, Nothing):
        assert trained(module=kind())[0].seen == [7] * 4


def test_step_with_any_arguments():
    class Everything(Small):
        def training_step(self, *args):
            Small.training_step(self, *args)

    assert trained(module=Everything())[0].seen == [0, 1, 2, 3]


# ---------------------------------------------------------------- DataModule


class Data(LightningDataModule):
    def __init__(self):
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append(f"setup {stage}")

    def teardown(self, stage):
        self.calls.append(f"teardown {stage}")

    def train_dataloader(self):
        self.calls.append("train")
        return loader(2)

    def val_dataloader(self):
        return loader(1)

    def test_dataloader(self):
        return [loader(1), loader(2)]

    def predict_dataloader(self):
        return loader(3)


class Evaluating(Small):
    def validation_step(self, batch, batch_idx):
        self.log("val", self.loss(batch))

    def test_step(self, batch, batch_idx, dataloader_idx):
        self.log("test", float(batch_idx))

    def predict_step(self, batch, batch_idx):
        return batch_idx


@pytest.mark.parametrize("keyword", ["train_dataloaders", "datamodule"])
def test_datamodule_gives_the_training_loader(keyword):
    data, module, run = Data(), Evaluating(), trainer(num_sanity_val_steps=0)
    run.fit(module, **{keyword: data})
    assert module.seen == [0, 1]
    assert data.calls == ["prepare_data", "setup fit", "train", "teardown fit"]
    assert "val" in run.callback_metrics
    assert run.datamodule is data
    assert data.trainer is run


@pytest.mark.parametrize("keyword", ["dataloaders", "datamodule"])
def test_datamodule_gives_the_evaluation_loaders(keyword):
    data, module, run = Data(), Evaluating(), trainer()
    assert len(run.validate(module, **{keyword: data})) == 1
    assert run.test(module, **{keyword: data}) == [{"test/dataloader_idx_0": 0.0}, {"test/dataloader_idx_1": 0.5}]
    assert run.predict(module, **{keyword: data}) == [0, 1, 2]
    stages = [call.split()[1] for call in data.calls if call.startswith("setup")]
    assert stages == ["validate", "test", "predict"]


@pytest.mark.parametrize("given", [{"train_dataloaders": 0}, {"val_dataloaders": 0}])
def test_loaders_beside_a_datamodule_are_refused(given):
    loaders = {name: loader(3) for name in given}
    with pytest.raises(ConfigurationError) as caught:
        trainer().fit(Evaluating(), **loaders, datamodule=Data())
    says(caught.value, "a loader or a datamodule that makes it", "both, so that Data.", "would be ignored")
    for verb in ("validate", "test", "predict"):
        with pytest.raises(ConfigurationError, match="a loader or a datamodule"):
            getattr(trainer(), verb)(Evaluating(), loader(3), datamodule=Data())


@pytest.mark.parametrize("wrong", [5, Data])
def test_a_datamodule_that_is_none(wrong):
    with pytest.raises(ConfigurationError) as caught:
        trainer().fit(Evaluating(), datamodule=wrong)
    says(caught.value, "a LightningDataModule", "datamodule=MyData()")


def test_module_that_does_not_validate_trains_with_a_datamodule_that_could():
    module = Small()
    with pytest.warns(UserWarning, match="validation_step"):
        trainer().fit(module, datamodule=Data())
    assert module.seen == [0, 1]


def test_datamodule_is_torn_down_after_an_exception():
    class Broken(Evaluating):
        def training_step(self, batch, batch_idx):
            raise KeyError("inside")

    data = Data()
    with pytest.raises(KeyError, match="inside"):
        trainer().fit(Broken(), datamodule=data)
    assert data.calls[-1] == "teardown fit"


class Transfers:
    """Every transfer hook leaves its mark on the batch."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return {"x": batch, "marks": ["before"]}

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        assert device == torch.device("cpu")
        return {"x": batch["x"].to(device), "marks": [*batch["marks"], "move"]}

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "marks": [*batch["marks"], f"after {dataloader_idx}"]}


class Marked(Small):
    def training_step(self, batch, batch_idx):
        self.seen.append(batch["marks"])

    def test_step(self, batch, batch_idx, dataloader_idx):
        self.seen.append(batch["marks"][-1])


class MarkedByModule(Transfers, Marked): ...


class MarkedByData(Transfers, Data): ...


@pytest.mark.parametrize(
    ("module", "data"), [(MarkedByModule, Data), (Marked, MarkedByData), (MarkedByModule, MarkedByData)]
)
def test_transfer_hooks(module, data):
    model = module()
    trainer(limit_train_batches=1, limit_val_batches=0).fit(model, datamodule=data())
    assert model.seen == [["before", "move", "after 0"]]
    trainer().test(model, datamodule=data())
    assert model.seen[1:] == ["after 0", "after 1", "after 1"]


def test_one_transfer_hook_leaves_the_move_to_the_backend():
    class OnlyBefore(Small):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [batch * 2]

        def training_step(self, batch, batch_idx):
            assert batch[0].dtype == torch.bfloat16
            self.seen.append(batch[0])

    module, _ = trained([torch.ones(2, 3)], OnlyBefore(), precision="bf16-true")
    assert torch.equal(module.seen[0], torch.full((2, 3), 2.0, dtype=torch.bfloat16))


def test_integers_keep_their_type():
    class Labels(Small):
        def training_step(self, batch, batch_idx):
            self.seen += [batch[0].dtype, batch[1].dtype]

    module, _ = trained([(rows(2), torch.tensor([0, 1]))], Labels(), precision="bf16-true")
    assert module.seen == [torch.bfloat16, torch.int64]


@pytest.mark.parametrize("name", ["train_dataloader", "val_dataloader"])
@pytest.mark.parametrize("owner", ["module", "datamodule"])
def test_none_switches_a_loader_off(name, owner):
    class Own(Evaluating):
        def train_dataloader(self):
            return loader(2)

        val_dataloader = train_dataloader

    module, data = Own(), Data()
    for each in (module, data) if owner == "module" else (data,):
        setattr(each, name, None)
    run = trainer(num_sanity_val_steps=0)
    given = {"train_dataloader": loader(3), "val_dataloader": None}
    run.fit(Evaluating() if owner == "datamodule" else module, given[name], None, data)
    assert ("val" in run.callback_metrics) == (name == "train_dataloader")
