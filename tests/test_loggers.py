"""CSV and TensorBoard loggers: what is on disk, also after a crash, and on ranks other than 0."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import Small, loader, says, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from xtrain import LightningModule, Trainer
from xtrain.errors import ConfigurationError, MissingDependencyError
from xtrain.loggers import CSVLogger, Logger, TensorBoardLogger, as_loggers

ROOT = Path(__file__).resolve().parents[1]


def table(logger):
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def run(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


# ---------------------------------------------------------------- CSV


def test_csv_has_a_row_per_call_and_columns_may_come_later(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 0.5}, step=1)
    logger.save()
    logger.log_metrics({"loss": 0.25, "norm, total": 2.0}, step=2)
    logger.log_metrics({"norm, total": 3.0})
    logger.finalize("success")
    assert Path(logger.log_dir) == tmp_path / "lightning_logs" / "version_0"
    assert table(logger) == [
        {"step": "1", "loss": "0.5", "norm, total": ""},
        {"step": "2", "loss": "0.25", "norm, total": "2.0"},
        {"step": "", "loss": "", "norm, total": "3.0"},
    ]
    assert [path.name for path in Path(logger.log_dir).iterdir()] == ["metrics.csv"]


def test_csv_keeps_every_digit(tmp_path):
    logger = CSVLogger(tmp_path)
    values = [0.1 + 0.2, 1e-300, float("inf"), float("nan")]
    for value in values:
        logger.log_metrics({"v": value}, step=0)
    logger.save()
    assert [repr(float(row["v"])) for row in table(logger)] == [repr(value) for value in values]


def test_csv_writes_after_so_many_rows(tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=3)
    for step in range(5):
        logger.log_metrics({"v": 1.0}, step)
    assert len(table(logger)) == 3
    logger.save()
    assert len(table(logger)) == 5


def test_csv_writes_nothing_before_it_has_something(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.save()
    logger.finalize("failed")
    assert list(tmp_path.iterdir()) == []


def test_csv_goes_on_in_an_existing_version(tmp_path):
    for step in (1, 2):
        logger = CSVLogger(tmp_path, version="mine")
        logger.log_metrics({"a": step} if step == 1 else {"b": 5.0, "a": step}, step)
        logger.save()
    assert logger.log_dir == str(tmp_path / "lightning_logs" / "mine")
    assert table(logger) == [{"step": "1", "a": "1", "b": ""}, {"step": "2", "a": "2", "b": "5.0"}]


def test_csv_drops_a_line_that_a_crash_left_torn(tmp_path):
    first = CSVLogger(tmp_path, version=0)
    first.log_metrics({"a": 1.0}, 1)
    first.save()
    with first.path.open("a") as file:
        file.write("2,3.14")
    second = CSVLogger(tmp_path, version=0)
    second.log_metrics({"a": 2.0}, 2)
    second.save()
    assert table(second) == [{"step": "1", "a": "1.0"}, {"step": "2", "a": "2.0"}]


KILLED = """
import os, signal, sys
from xtrain.loggers import CSVLogger
logger = CSVLogger(sys.argv[1], flush_logs_every_n_steps=2)
for step in range(7):
    logger.log_metrics({"v": float(step), f"new_{step // 2}": 1.0}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_csv_survives_a_kill(tmp_path):
    assert run(KILLED, tmp_path).returncode == -signal.SIGKILL
    rows = table(CSVLogger(tmp_path, version=0))
    assert [row["v"] for row in rows] == ["0.0", "1.0", "2.0", "3.0", "4.0", "5.0"]
    assert rows[5]["new_2"] == "1.0"


def test_csv_hyperparameters(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.1, "layers": [1, 2], "path": Path("data")})
    assert json.loads((Path(logger.log_dir) / "hparams.json").read_text()) == {
        "lr": 0.1,
        "layers": [1, 2],
        "path": "data",
    }


def test_hyperparameters_are_json_without_the_contents_of_objects(tmp_path):
    logger = CSVLogger(tmp_path)
    values = {"nan": math.nan, "data": torch.arange(9), "net": torch.nn.ReLU, "any": object(), "deep": {"x": (1,)}}
    logger.log_hyperparams({**values, "long": Path("x" * 500), "dtype": torch.float16})
    written = json.loads((Path(logger.log_dir) / "hparams.json").read_text(), parse_constant=pytest.fail)
    assert written | {"long": ""} == {
        "nan": "nan",
        "data": "tensor of shape (9,), torch.int64",
        "net": "torch.nn.modules.activation.ReLU",
        "any": "builtins.object",
        "deep": {"x": [1]},
        "dtype": "torch.float16",
        "long": "",
    }
    assert len(written["long"]) == 203


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_what_holds_hyperparameters_can_be_read_by_its_owner_only(tmp_path, kind):
    logger = kind(tmp_path, version=0)
    if kind is CSVLogger:
        Path(logger.log_dir).mkdir(parents=True)
        (Path(logger.log_dir) / "hparams.json").write_text("of an earlier run")
    logger.log_hyperparams({"token": "secret"})
    logger.finalize("success")
    (written,) = Path(logger.log_dir).iterdir()
    assert b"secret" in written.read_bytes()
    assert stat.S_IMODE(written.stat().st_mode) == 0o600


@pytest.mark.parametrize("rows", [0, -1, 1.5, "x", True, None])
def test_csv_refuses_to_keep_no_rows(rows):
    with pytest.raises(ConfigurationError, match=f"flush_logs_every_n_steps={rows!r}"):
        CSVLogger("logs", flush_logs_every_n_steps=rows)


def test_csv_refuses_a_metric_with_the_name_of_its_first_column(tmp_path):
    with pytest.raises(ConfigurationError, match="other names than 'step'"):
        CSVLogger(tmp_path).log_metrics({"step": 5.0}, step=1)


FULL = """
import csv, os, sys, warnings
from xtrain.loggers import CSVLogger
warnings.simplefilter("always")
logger = CSVLogger(sys.argv[1], flush_logs_every_n_steps=50)
limit = {2: 2500, 5: 5500}  # bytes a file may have, as on a full disk, while that block of rows is written
for i in range(500):
    if i % 50 == 0:
        allowed = limit.get(i // 50, 2**30)
        import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, resource.RLIM_INFINITY))
    logger.log_metrics({"a": i + .123456789012345, **({"b": 1.0} if i > 270 else {})}, i)
logger.finalize("success")
with open(logger.path) as file:
    rows = list(csv.DictReader(file))
print([int(row["step"]) for row in rows] == list(range(500)), {None} & set(rows[-1]), os.listdir(logger.log_dir))
"""


def test_csv_keeps_its_rows_while_the_disk_is_full_and_writes_each_once(tmp_path):
    code = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + FULL
    result = run(code, tmp_path)
    assert result.stdout == "True set() ['metrics.csv']\n", result.stderr
    assert result.stderr.count("Expected to write") == 2
    assert "File too large" in result.stderr


def test_csv_says_how_many_rows_are_lost_if_the_disk_stays_full(tmp_path):
    code = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += "from xtrain.loggers import CSVLogger; logger = CSVLogger(sys.argv[1])\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))\n"
    code += "[logger.log_metrics({'a': 1.0}, i) for i in range(7)]; logger.finalize('success')"
    result = run(code, tmp_path)
    assert result.returncode == 0
    assert "7 rows that could not be written and are lost" in result.stderr


def test_two_runs_that_share_a_version_never_write_under_each_others_columns(tmp_path):
    first, second = (CSVLogger(tmp_path, version=0, flush_logs_every_n_steps=1) for _ in range(2))
    for step in range(3):
        first.log_metrics({"a": 1.0, **({"c": 3.0} if step else {})}, step)
        second.log_metrics({"b": 2.0}, step)
    found = [{k: v for k, v in row.items() if v and k != "step"} for row in table(first)]
    assert found == [{"a": "1.0"}, {"b": "2.0"}, *[{"a": "1.0", "c": "3.0"}, {"b": "2.0"}] * 2]


# ---------------------------------------------------------------- versions and ranks


def test_versions_count_up_and_two_runs_never_share_a_folder(tmp_path):
    (tmp_path / "lightning_logs" / "version_7").mkdir(parents=True)
    (tmp_path / "lightning_logs" / "version_old").mkdir()
    first, second = CSVLogger(tmp_path), TensorBoardLogger(tmp_path)
    assert (first.version, second.version, first.version) == (8, 9, 8)
    assert (first.name, CSVLogger(tmp_path, "gan", 3).log_dir) == (
        "lightning_logs",
        str(tmp_path / "gan" / "version_3"),
    )


def test_a_folder_made_since_one_looked_belongs_to_the_other_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    assert [CSVLogger(tmp_path).version for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
@pytest.mark.parametrize(
    "wrong",
    [
        *({"save_dir": value} for value in (5, None, "")),
        *({"name": value} for value in (5, "../up", "/etc", "a/../../b")),
        *({"version": value} for value in (-1, 1.5, True, "", "..", "/tmp/x")),
    ],
    ids=str,
)
def test_arguments_that_mean_nothing_or_leave_the_folder_are_refused(tmp_path, kind, wrong):
    with pytest.raises(ConfigurationError) as caught:
        kind(**{"save_dir": tmp_path, **wrong})
    says(caught.value, repr(*wrong.values()), f"{kind.__name__}('logs', name='gan', version=0)")


def test_a_name_may_be_missing_or_have_folders(tmp_path):
    assert CSVLogger(tmp_path, None).log_dir == str(tmp_path / "version_0")
    assert CSVLogger(tmp_path, "gan/small", "first").log_dir == str(tmp_path / "gan" / "small" / "first")


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_a_place_that_cannot_be_written_to_is_refused_when_it_is_claimed(tmp_path, kind):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError) as caught:
        kind(tmp_path / "file").prepare()
    says(caught.value, f"a folder that {kind.__name__} can write to")
    for version in (None, "mine"):
        logger = kind(tmp_path, "gan", version)
        logger.prepare()
        assert Path(logger.log_dir).is_dir()


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_a_disabled_logger_writes_nothing(tmp_path, kind):
    logger = kind(tmp_path)
    logger.enabled = False
    logger.log_metrics({"loss": 1.0}, 1)
    logger.log_hyperparams({"lr": 0.1})
    logger.save()
    logger.finalize("success")
    assert logger.log_dir.endswith("version_0")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_events_can_be_read_back(tmp_path):
    logger = TensorBoardLogger(tmp_path, "gan")
    for step in (10, 20):
        logger.log_metrics({"loss/g": 1.0 / step, "epoch": 0}, step)
    logger.log_hyperparams({"lr": 0.1, "betas": (0.5, 0.9)})
    logger.experiment.add_text("note", "hello")
    logger.save()
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "gan" / "version_0")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/g")] == [
        (10, pytest.approx(0.1)),
        (20, pytest.approx(0.05)),
    ]
    assert events.Tags()["scalars"] == ["loss/g", "epoch"]
    hyperparameters = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"betas" in hyperparameters
    assert b"(0.5, 0.9)" in hyperparameters
    assert "note/text_summary" in events.Tags()["tensors"]


def test_tensorboard_writes_on_after_it_was_finalized(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    for step in (1, 2):
        logger.log_metrics({"v": float(step)}, step)
        logger.finalize("success")
        logger.save()
    events = EventAccumulator(logger.log_dir).Reload()
    # Two files of one second are read in the order of their numbers as text: 10 before 9.
    assert sorted(event.step for event in events.Scalars("v")) == [1, 2]


WITHOUT_TENSORBOARD = """
import sys
sys.modules["tensorboard"] = None
from xtrain.loggers import TensorBoardLogger
logger = TensorBoardLogger(sys.argv[1])
try:
    logger.log_metrics({"v": 1.0}, 1)
except ImportError as error:
    print(type(error).__name__, error)
"""


def test_tensorboard_missing_gives_the_pip_line(tmp_path):
    result = run(WITHOUT_TENSORBOARD, tmp_path)
    assert result.stdout.startswith(MissingDependencyError.__name__), result.stderr
    assert "pip install 'xtrain-torch[loggers]'" in result.stdout


IMPORTED = """
import sys, torch
before = set(sys.modules)
import xtrain.loggers, xtrain.callbacks
print({"tensorboard", "tqdm"} & (set(sys.modules) - before))
"""


def test_importing_loggers_and_callbacks_imports_no_optional_package():
    result = run(IMPORTED)
    assert result.stdout == "set()\n", result.stderr


# ---------------------------------------------------------------- what a Trainer may be given


def test_as_loggers(tmp_path):
    mine = CSVLogger(tmp_path)
    assert as_loggers(None, str(tmp_path)) == as_loggers(False, str(tmp_path)) == []
    assert as_loggers(mine, str(tmp_path)) == as_loggers([mine], str(tmp_path)) == [mine]
    (default,) = as_loggers(True, str(tmp_path))
    assert isinstance(default, CSVLogger)
    assert default.log_dir == str(tmp_path / "lightning_logs" / "version_0")


@pytest.mark.parametrize("wrong", ["csv", 3, [CSVLogger("logs"), None]])
def test_as_loggers_refuses(wrong):
    with pytest.raises(ConfigurationError, match="logger=True, a Logger, or a list of them"):
        as_loggers(wrong, "logs")


def test_a_logger_of_ones_own_needs_three_things():
    class Mine(Logger):
        name, version = "mine", 0

        def log_metrics(self, metrics, step=None):
            self.last = metrics

    logger = Mine()
    logger.log_hyperparams({"lr": 1})
    logger.finalize("success")
    assert logger.log_dir is None
    with pytest.raises(TypeError, match="abstract"):
        type("Incomplete", (Logger,), {"name": "x"})()


# ---------------------------------------------------------------- in a Trainer


class Counting(LightningModule):
    """Logs the number of its step, and stops at a step of its own if told to."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.automatic_optimization = False
        self.save_hyperparameters()
        self.w = torch.nn.Parameter(torch.zeros(()))
        self.fail_at, self.count = fail_at, 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def training_step(self, batch, batch_idx):
        self.count += 1
        if self.count == self.fail_at:
            raise ZeroDivisionError
        self.log("count", torch.tensor(float(self.count)), on_step=True, on_epoch=True)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.w * batch.sum())
        optimizer.step()


def trainer_with(*loggers, every=2):
    return Trainer("cpu", max_epochs=2, log_every_n_steps=every, logger=list(loggers), enable_progress_bar=False)


def test_a_training_is_logged_to_all_loggers(tmp_path):
    text, board = CSVLogger(tmp_path), TensorBoardLogger(tmp_path)
    trainer_with(text, board).fit(Counting(), [torch.ones(2)] * 4)
    assert [(row["step"], row["epoch"], row["count_step"], row["count_epoch"]) for row in table(text)] == [
        ("1", "0", "2.0", ""),
        ("3", "0", "4.0", ""),
        ("3", "0", "", "2.5"),
        ("5", "1", "6.0", ""),
        ("7", "1", "8.0", ""),
        ("7", "1", "", "6.5"),
    ]
    events = EventAccumulator(board.log_dir).Reload()
    assert [(event.step, event.value) for event in events.Scalars("count_step")] == [(1, 2), (3, 4), (5, 6), (7, 8)]
    assert [(event.step, event.value) for event in events.Scalars("count_epoch")] == [(3, 2.5), (7, 6.5)]


def test_a_training_that_fails_has_written_what_it_logged(tmp_path):
    logger = CSVLogger(tmp_path)
    with pytest.raises(ZeroDivisionError):
        trainer_with(logger).fit(Counting(fail_at=4), [torch.ones(2)] * 6)
    assert [row["count_step"] for row in table(logger)] == ["2.0", "3.0"], "the log point, and what came after it"


def test_log_points_do_not_start_over_with_each_epoch(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer_with(logger, every=3).fit(Counting(), [torch.ones(2)] * 2)
    assert [row["step"] for row in table(logger) if row["count_step"]] == ["1", "2", "3"]


def test_hyperparameters_reach_the_loggers(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer_with(logger).fit(Counting(fail_at=50), [torch.ones(2)])
    assert json.loads((Path(logger.log_dir) / "hparams.json").read_text()) == {"fail_at": 50}


class Windows(Counting):
    """Automatic optimization, which may accumulate."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = True

    def training_step(self, batch, batch_idx):
        self.log("loss", float(batch_idx))
        return self.w * batch.sum()


def test_the_axis_counts_batches_and_those_that_are_accumulated_as_one(tmp_path):
    logger = CSVLogger(tmp_path)
    options = {"accumulate_grad_batches": 2, "log_every_n_steps": 1, "logger": logger, "enable_progress_bar": False}
    Trainer("cpu", max_epochs=2, **options).fit(Windows(), [torch.ones(2)] * 3)
    found = [(row["step"], row["epoch"], row["loss"]) for row in table(logger)]
    assert found == [("0", "0", "1.0"), ("1", "0", "2.0"), ("2", "1", "1.0"), ("3", "1", "2.0")]


class CutOff(Small):
    """Logs its index in each step, and is interrupted in one of training or of validation."""

    def __init__(self, at: tuple[str, int]) -> None:
        super().__init__()
        self.at = at

    def training_step(self, batch, batch_idx):
        self.log("trained", torch.tensor(float(batch_idx)))
        if self.at == ("train", batch_idx):
            raise KeyboardInterrupt
        super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("validated", float(batch_idx), on_step=True, on_epoch=False)
        if self.at == ("validate", batch_idx):
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (("train", 2), ["2,0,,2.0"]),
        (("validate", 2), ["0,0,0.0,", "1,0,1.0,", "2,0,2.0,", "3,0,,3.0"]),
    ],
    ids=["train", "validate"],
)
def test_values_that_did_not_come_to_their_log_point_are_written(at, expected, tmp_path):
    logger = CSVLogger(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer(logger=logger, num_sanity_val_steps=0).fit(CutOff(at), loader(), loader())
    header, *rows = logger.path.read_text(encoding="utf-8").splitlines()
    assert header.startswith("step,epoch")
    names = header.split(",")
    order = [names.index(name) if name in names else None for name in ("step", "epoch", "validated", "trained")]
    cells = [row.split(",") for row in rows]
    assert [",".join("" if i is None else row[i] for i in order) for row in cells] == expected


@pytest.mark.parametrize("version", ["../elsewhere", "/elsewhere", "a/../../b"])
def test_a_version_of_a_checkpoint_cannot_leave_the_folder(version, tmp_path):
    logger = CSVLogger(tmp_path)
    with pytest.raises(ConfigurationError, match="stays in save_dir"):
        logger.load_state_dict({"version": version})
