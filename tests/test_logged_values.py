"""What loggers are given: hyperparameters of every kind, images, names with a prefix."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small import Small, says, trained
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from xtrain import ConfigurationError
from xtrain.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from xtrain.loggers.values import as_dict, as_pixels, flat, plain


@dataclasses.dataclass
class Settings:
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)


def test_hyperparameters_of_every_kind(tmp_path):
    expected = {"a": 1, "b": {"c": 2}}
    assert as_dict(argparse.Namespace(a=1, b={"c": 2})) == as_dict({"a": 1, "b": argparse.Namespace(c=2)}) == expected
    assert as_dict(Settings()) == {"lr": 0.1, "betas": (0.9, 0.99)}
    assert as_dict(None) == {}
    assert plain({"a": Settings(), "b": torch.zeros(2)}) == {
        "a": {"lr": 0.1, "betas": [0.9, 0.99]},
        "b": "tensor of shape (2,), torch.float32",
    }
    assert flat({"a": {"b": {"c": True}}, "d": None, "e": {}}) == {"a/b/c": True, "d": "None", "e": "{}"}
    for wrong in (3, "lr", [1], Settings):
        with pytest.raises(ConfigurationError) as caught:
            as_dict(wrong)
        says(caught.value, "log_hyperparams")
    logger = CSVLogger(tmp_path)
    logger.log_hyperparams(argparse.Namespace(a=1))
    assert json.loads(Path(logger.log_dir, "hparams.json").read_text()) == {"a": 1}
    TensorBoardLogger(tmp_path).log_hyperparams(argparse.Namespace(a=1, b=Settings()))


def figure():
    from matplotlib.figure import Figure

    return Figure(figsize=(0.5, 0.25), dpi=100, facecolor="red")


def test_images_of_every_kind():
    gray = torch.tensor([[0.0, 0.5, 1.0]])
    assert as_pixels(gray).tolist() == as_pixels(gray[None].bfloat16()).tolist() == [[[0], [128], [255]]]
    assert as_pixels(np.array([[[0, 128, 255]]], dtype=np.uint8)).tolist() == [[[0, 128, 255]]]
    assert as_pixels(torch.tensor([[[0]], [[128]], [[255]]], dtype=torch.uint8)).tolist() == [[[0, 128, 255]]]
    assert as_pixels(figure()).shape == (25, 50, 4)
    assert as_pixels(figure())[0, 0].tolist() == [255, 0, 0, 255]
    for wrong in (torch.zeros(2, 3, 4, 4), torch.zeros(5, 4, 4), "cat.png", torch.zeros(4)):
        with pytest.raises(ConfigurationError) as caught:
            as_pixels(wrong)
        says(caught.value, "1, 3 or 4 channels")


def test_one_call_shows_an_image_in_every_logger_that_can(tmp_path):
    class Drawing(Small):
        def on_train_epoch_end(self):
            self.log_image("sample", torch.zeros(3, 4, 5))
            self.log_image("plot", [figure(), figure()])

    board = TensorBoardLogger(tmp_path)
    trained(module=Drawing(), logger=[CSVLogger(tmp_path), board])
    events = EventAccumulator(board.log_dir).Reload()
    assert sorted(events.Tags()["images"]) == ["plot/0", "plot/1", "sample"]
    (image,) = events.Images("sample")
    assert (image.height, image.width) == (4, 5)


def test_an_image_that_no_logger_shows_is_said_once():
    class Drawing(Small):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.log_image("sample", torch.zeros(3, 4, 5))

    with pytest.warns(UserWarning, match="a logger that shows images") as caught:
        trained(module=Drawing())
    assert len(caught) == 1


class Logging(Small):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.log("loss", 1.0)


def test_names_may_have_a_prefix(tmp_path):
    plain, board = CSVLogger(tmp_path, prefix="gan"), TensorBoardLogger(tmp_path, prefix="gan")
    trained(module=Logging(), logger=[plain, board], log_every_n_steps=4)
    assert "gan-loss" in plain.path.read_text().splitlines()[0]
    assert "gan-loss" in EventAccumulator(board.log_dir).Reload().Tags()["scalars"]


@pytest.mark.parametrize(
    ("kind", "package"), [("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow"), ("AimLogger", "aim")]
)
def test_a_package_that_is_missing_is_named(monkeypatch, kind, package):
    import xtrain.loggers

    for name in [name for name in sys.modules if name.split(".")[0] == package] or [package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"pip install 'xtrain-torch\[{package}\]'"):
        _ = getattr(xtrain.loggers, kind)().experiment


def test_wandb_uploads_no_checkpoints_and_says_so():
    with pytest.raises(ConfigurationError) as caught:
        WandbLogger(log_model="all")
    says(caught.value, "log_model='all'", "log_artifact")
