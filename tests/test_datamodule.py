"""A DataModule beside its loaders: hyperparameters, datasets, exceptions, who prepares; callbacks of a module."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from small import Small, loader, rows, says, trained, trainer

from xtrain import Callback, ConfigurationError, LightningDataModule
from xtrain.callbacks import EarlyStopping, LambdaCallback
from xtrain.loggers import CSVLogger


class Data(LightningDataModule):
    def __init__(self, batches=4, noise=0.5):
        super().__init__()
        self.save_hyperparameters()
        self.seen = []

    def train_dataloader(self):
        return loader(self.hparams.batches)

    def on_exception(self, exception):
        self.seen.append(type(exception).__name__)


class Kept(Small):
    def __init__(self, lr=0.25):
        super().__init__()
        self.save_hyperparameters()


def test_hyperparameters_of_both_reach_the_loggers(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(logger=logger).fit(Kept(), datamodule=Data(batches=2))
    kept = json.loads(Path(logger.log_dir, "hparams.json").read_text())
    assert kept == {"batches": 2, "noise": 0.5, "lr": 0.25}


def test_loaders_of_given_datasets():
    data = rows(8)
    module = LightningDataModule.from_datasets(data, [data, data[:4]], batch_size=2)
    first, second = module.val_dataloader()
    assert torch.equal(torch.cat(list(first)), data)
    assert torch.equal(torch.cat(list(second)), data[:4])
    read = torch.cat(list(module.train_dataloader()))
    assert not torch.equal(read, data)
    assert torch.equal(read.sort(0).values, data.sort(0).values)
    assert str(module) == "LightningDataModule(train: 4 batches, val: [4, 2] batches)"
    assert str(pickle.loads(pickle.dumps(module))) == str(module)
    assert str(Data.from_datasets(batches=3)) == "Data(train: 3 batches)"


def test_from_datasets_tells_init_what_it_has_an_argument_for():
    class Sized(LightningDataModule):
        def __init__(self, other, batch_size=1):
            super().__init__()
            self.other, self.batch_size = other, batch_size

    class Anything(LightningDataModule):
        def __init__(self, **kwargs):
            super().__init__()
            self.given = kwargs

    module = Sized.from_datasets(torch.randn(8, 3), batch_size=4, num_workers=0, other=5)
    assert (module.other, module.batch_size) == (5, 4)
    given = Anything.from_datasets(torch.randn(8, 3), batch_size=2, other=5).given
    assert given == {"batch_size": 2, "num_workers": 0, "other": 5}
    with pytest.raises(TypeError, match="other"):
        Sized.from_datasets(torch.randn(8, 3))


def test_a_datamodule_hears_of_an_exception():
    class Broken(Small):
        def training_step(self, batch, batch_idx):
            raise KeyError("broken")

    data = Data()
    with pytest.raises(KeyError):
        trainer().fit(Broken(), datamodule=data)
    assert data.seen == ["KeyError"]
    trainer().fit(Small(), datamodule=data)
    assert data.seen == ["KeyError"]


@pytest.mark.parametrize(
    ("rank", "local_rank", "per_node", "prepares"),
    [(0, 0, True, True), (1, 1, True, False), (2, 0, True, True), (2, 0, False, False), (0, 0, False, True)],
)
def test_one_process_per_host_prepares(monkeypatch, rank, local_rank, per_node, prepares):
    """Another rank is only pretended: the run is one process, and asks its collectives who it is."""
    asked = []

    class Downloads(Data):
        prepare_data_per_node = per_node

        def prepare_data(self):
            asked.append(True)

    run = trainer()
    monkeypatch.setattr(type(run.backend.collectives), "rank", rank)
    monkeypatch.setattr(type(run.backend.collectives), "local_rank", local_rank)
    run.fit(Small(), datamodule=Downloads())
    assert bool(asked) is prepares


def test_a_module_brings_callbacks():
    calls = []

    class Bringing(Small):
        def configure_callbacks(self):
            stop = EarlyStopping("loss", patience=7, strict=False)
            return [stop, LambdaCallback(on_train_end=lambda trainer, module: calls.append("module's"))]

    given = [EarlyStopping("other"), LambdaCallback(on_train_end=lambda trainer, module: calls.append("trainer's"))]
    _, run = trained(module=Bringing(), callbacks=given)
    assert calls == ["module's"]
    assert [c.patience for c in run.callbacks if isinstance(c, EarlyStopping)] == [7]

    class One(Small):
        def configure_callbacks(self):
            return Callback()

    module = One()
    _, run = trained(module=module, enable_model_summary=False)
    run.max_epochs = 2
    run.fit(module, loader())
    assert [type(c) for c in run.callbacks] == [Callback]

    class Wrong(Small):
        def configure_callbacks(self):
            return [print]

    with pytest.raises(ConfigurationError) as caught:
        trained(module=Wrong())
    says(caught.value, "derived from xtrain.Callback")
