"""Loggers of services, each by its own package and offline: what arrived is read back by the package's own reader."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

import torch
from fresh import fresh
from small import Small, trained

from xtrain.loggers import AimLogger, MLFlowLogger, WandbLogger


@dataclasses.dataclass
class Settings:
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)


HYPERPARAMETERS = {"lr": 0.5, "net": {"width": 3, "kind": torch.nn.ReLU}, "settings": Settings(), "path": Path("a")}


class Logged(Small):
    """Logs a loss per step, an image and hyperparameters of several kinds."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters(HYPERPARAMETERS)

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.log("loss", float(batch_idx))
        if batch_idx == 3:
            self.log_image("sample", torch.linspace(0, 1, 12).reshape(1, 3, 4))


def run_with(logger):
    trained(module=Logged(), logger=logger, log_every_n_steps=2)


# ---------------------------------------------------------------- the services


def records(data, header=7, block=2**15):
    """Yield the records of a log as LevelDB writes it: blocks of parts, each with checksum, length and kind."""
    position, parts = header, b""
    while position + 7 <= len(data):
        length, kind = struct.unpack_from("<HB", data, position + 4)
        if kind == 0:  # the rest of the block is empty
            position += block - position % block
            continue
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""
        if block - position % block < 7:
            position += block - position % block


def through_wandb(folder):
    import wandb

    logger = WandbLogger(name="first", save_dir=folder, offline=True, project="digits", prefix="p")
    run_with(logger)
    wandb.finish()
    return logger.name, logger.version


def read_wandb(folder, identity):
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = Path(folder).glob(f"wandb/offline-run-*/run-{identity}.wandb")
    rows, config = [], {}
    for data in records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
        for item in [*record.config.update, *record.run.config.update]:
            config[item.key] = json.loads(item.value_json)
    return [{k: v for k, v in row.items() if k[0] != "_"} for row in rows], config


def test_wandb(tmp_path):
    name, identity = fresh(through_wandb, str(tmp_path), WANDB_SILENT="true")
    assert name == "digits"
    rows, config = fresh(read_wandb, str(tmp_path), identity)
    scalars = [row for row in rows if "p-loss" in row]
    assert [row["p-loss"] for row in scalars] == [1.0, 3.0]
    assert scalars[0].keys() == {"p-loss", "p-epoch", "trainer/global_step"}
    assert any(any(key.startswith("sample") for key in row) for row in rows)
    assert (config["lr"], config["net"]["width"], config["settings"]["lr"]) == (0.5, 3, 0.1)


def through_mlflow(folder):
    from mlflow.tracking import MlflowClient

    uri = Path(folder).as_uri()
    logger = MLFlowLogger("digits", run_name="first", tracking_uri=uri, tags={"who": "me"})
    run_with(logger)
    client = MlflowClient(uri)
    run = client.get_run(logger.run_id)
    history = [(m.step, m.value) for m in client.get_metric_history(logger.run_id, "loss")]
    images = [f.path for f in client.list_artifacts(logger.run_id, "sample")]
    experiment = client.get_experiment(run.info.experiment_id).name
    return experiment, run.info.run_name, run.info.status, run.data.tags["who"], history, run.data.params, images


def test_mlflow(tmp_path):
    allowed = {"MLFLOW_ALLOW_FILE_STORE": "true"}
    experiment, name, status, tag, history, params, images = fresh(through_mlflow, str(tmp_path), **allowed)
    assert (experiment, name, status, tag) == ("digits", "first", "FINISHED", "me")
    assert [value for _, value in history] == [1.0, 3.0]
    assert len({step for step, _ in history}) == 2
    assert (params["lr"], params["net/width"], params["settings/betas"]) == ("0.5", "3", "(0.9, 0.99)")
    assert len(images) == 1


def through_aim(folder):
    from aim import Run
    from aim.storage.context import Context

    logger = AimLogger(repo=folder, experiment="digits", run_name="first")
    run_with(logger)
    run = Run(logger.version, repo=folder)
    values = {m.name: m.dataframe()[["step", "value"]].values.tolist() for m in run.metrics()}
    images = len(run.get_image_sequence("sample", Context({})).values.sparse_list()[1])
    return run.experiment, run.name, values, run["hparams", "lr"], run["hparams", "net", "width"], images


def test_aim(tmp_path):
    experiment, name, values, lr, width, images = fresh(through_aim, str(tmp_path))
    assert (experiment, name, lr, width) == ("digits", "first", 0.5, 3)
    assert values["loss"] == [[1, 1.0], [3, 3.0]]
    assert images == 1
