"""``xtrain check`` as a user starts it: the JSON, the exit status, bad input, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch._dynamo  # once, in place of in each fork
from torch import nn

from xtrain import ConfigurationError, LightningModule, Trainer
from xtrain.cli.rehearsal import ignored_here
from xtrain.rehearsal import Check, Finding, RehearsalError, Settings, rehearse
from xtrain.rehearsal.arguments import read_init
from xtrain.rehearsal.batches import make_batches
from xtrain.rehearsal.subject import Source, in_memory
from xtrain.testing import rehearse as rehearse_in_test

ROOT = Path(__file__).resolve().parent.parent.parent
GALLERY = Path(__file__).parent / "gallery"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
PROTOCOL = Settings(checks=("protocol",))

MODEL = """
import os, sys, time
import torch
from torch import nn
from xtrain import LightningModule, Trainer

class Model(LightningModule):
    def __init__(self, width, rate: float = 0.1, sizes: list[int] = [1]):
        super().__init__()
        self.net, self.rate = nn.Linear(4, width), rate

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)

    def training_step(self, batch, batch_idx):
        {body}
        return self.net(batch).square().mean()

{after}
"""


def write(folder, body="pass", after="", name="model.py"):
    path = folder / name
    path.write_text(MODEL.format(body=body, after=after))
    return path


def xtrain_check(*arguments, cwd, seconds=250):
    command = [sys.executable, "-m", "xtrain", "check", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=seconds)


class Plain(LightningModule):
    """Does what it is given in its step."""

    def __init__(self, body=lambda: None):
        super().__init__()
        self.net, self.body = nn.Linear(4, 1), body

    def training_step(self, batch, batch_idx):
        self.body()
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


DATA = [torch.ones(8, 4) for _ in range(4)]


# ---------------------------------------------------------------- what CI and editors build on


def test_json_is_one_object_of_schema_1_and_errors_exit_with_1(tmp_path):
    path = GALLERY / "clip_after_step.py"
    done = xtrain_check(f"{path}:Model", "--batch", "8x4", "--for", "16-mixed", "--json", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert list(report) == ["schema", "module", "findings", "skipped", "figures"]
    assert (report["schema"], report["module"]) == (1, f"{path}:Model")
    (first,) = [finding for finding in report["findings"] if finding["severity"] == "error"]
    assert list(first) == ["id", "severity", "target", "file", "line", "message", "fix"]
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "planted" in text)
    assert (first["id"], first["file"], first["line"]) == ("XT-PROTOCOL-01", str(path), line)
    assert {"check", "reason"} == set(report["skipped"][0])


def test_ignored_ids_are_left_out_and_the_screen_shows_the_line(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.xtrain.check]\nignore = ["XT-PROTOCOL-03"]\n')
    asked = (f"{GALLERY / 'raw_backward.py'}:Model", "--batch", "8x4", "--for", "processes")
    both = xtrain_check(*asked, cwd=tmp_path)
    assert both.returncode == 1
    assert "> self.net(batch).square().mean().backward()" in both.stdout
    assert "not looked at: data: " in both.stdout
    silent = xtrain_check(*asked, "--ignore", "XT-PROTOCOL-02", cwd=tmp_path)
    assert (silent.returncode, "XT-PROTOCOL-02" in silent.stdout) == (0, False)


def test_pyproject_of_a_folder_above(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    assert ignored_here() == []
    (tmp_path / "pyproject.toml").write_text('[tool.xtrain.check]\nignore = ["XT-A-1"]\n')
    assert ignored_here() == ["XT-A-1"]
    (tmp_path / "pyproject.toml").write_text("[tool.xtrain.check]\nignore = 3\n")
    with pytest.raises(ConfigurationError, match="a list of ids"):
        ignored_here()


def test_script_is_run_up_to_its_fit(tmp_path):
    after = 'print(sys.argv[1:]); t = Trainer("cpu"); t.fit(Model(1), [torch.ones(8, 4)] * 4); sys.exit("went on")'
    write(tmp_path, after=after, name="train.py")
    done = xtrain_check("train.py", "--for", "16-mixed", "--", "--epochs", "3", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("train.py: nothing will go wrong")


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("after", "arguments", "parts"),
    [
        ("import missing_thing", [], ["ModuleNotFoundError", 'model.py", line 19']),
        ("", ["--init", "widht=3"], ["widht", "--init width=3"]),
        ("", [], ["--init width=..."]),
        ("", ["--init", "width=1", "--init", "rate=fast"], ["rate as float", "'fast'"]),
        ("", ["--init", "width=1"], ["batches for Model", "--data model.py:loader"]),
        ("answer = input('really? ')", ["--init", "width=1"], ["asks for input", "answer = input"]),
        ("sys.exit(3)", [], ["ends the process", "exit status 3"]),
        ("", ["--init", "width=1", "--batch", "8by4"], ["sizes with x between them"]),
        ("", ["--init", "width=1", "--batch", "8x4", "--for", "tpo"], ["Expected a backend out of", "'tpo'"]),
    ],
    ids=["import", "misspelt", "needs", "type", "no-data", "prompt", "exit", "batch", "target"],
)
def test_what_cannot_be_rehearsed_exits_with_2(tmp_path, after, arguments, parts):
    write(tmp_path, after=after)
    done = xtrain_check("model.py:Model", *arguments, "--json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done.stdout
    assert [part for part in parts if part not in done.stderr] == [], done.stderr
    assert not any(f"{ROOT}/xtrain" in line for line in done.stderr.splitlines()), "the user's code only"


def test_init_has_the_types_of_the_signature(tmp_path):
    def make(a: int, b: float, c: str, d: list[int], e: bool = False, f=None, g: float | None = None): ...

    given = ["a=3", "b=1", "c=07", "d=[1, 2]", "e=true", "f=relu", "g=null"]
    expected = {"a": 3, "b": 1.0, "c": "07", "d": [1, 2], "e": True, "f": "relu", "g": None}
    assert read_init(given, make) == expected
    (tmp_path / "c.json").write_text(json.dumps({"model": {k: v for k, v in expected.items() if k != "b"}}))
    assert read_init([str(tmp_path / "c.json"), "b=2"], make) == {**expected, "b": 2.0}


def test_batches_have_the_shapes_and_kinds_of_the_specification():
    (x, y, flag), *others = make_batches("6x3x2,6:int10,6:bool", 3)
    assert (x.shape, len(others)) == ((6, 3, 2), 2)
    assert (x.dtype, y.dtype, flag.dtype) == (torch.float32, torch.int64, torch.bool)
    assert 1 < y.max() < 10
    assert make_batches("x=2x2,y=2:int", 1)[0].keys() == {"x", "y"}
    assert make_batches("none", 2) == [None, None]


# ---------------------------------------------------------------- what user code does to its process


def in_a_step(body, seconds=None):
    checks = PROTOCOL
    return rehearse(Source("Plain"), checks, in_memory(Plain(body), DATA))


def here(offset=0):
    return sys._getframe(1).f_lineno + offset


@pytest.mark.parametrize(
    ("body", "id"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "XT-RUN-02"),
        (lambda: sys.exit(3), "XT-RUN-03"),
        (lambda: os._exit(3), "XT-RUN-03"),
        (lambda: os.fork(), "XT-RUN-04"),
        (lambda: input("go on? "), "XT-RUN-05"),
        (lambda: 1 / 0, "XT-RUN-06"),
    ],
    ids=["crash", "exit", "os-exit", "fork", "prompt", "error"],
)
def test_what_a_step_does_to_its_process_is_a_finding_at_its_line(body, id):
    report = in_a_step(body)
    (finding,) = [finding for finding in report.findings if finding.id == id]
    assert (finding.file, finding.line) == (__file__, body.__code__.co_firstlineno)
    assert report.status == 1


def test_hang_is_a_finding_and_nothing_is_left(monkeypatch):
    from xtrain.rehearsal.checks.protocol import Protocol

    monkeypatch.setattr(Protocol, "seconds", 6.0)
    body = lambda: (subprocess.Popen(["sleep", "4711"]), time.sleep(4711))  # noqa: E731  # its line is looked for
    report = in_a_step(body)
    (finding,) = report.findings
    assert (finding.id, finding.line) == ("XT-RUN-01", body.__code__.co_firstlineno)
    assert "4711" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_ctrl_c_leaves_nothing_behind(tmp_path):
    write(tmp_path, body="time.sleep(4712) if os.system('sleep 4713 &') == 0 else None")
    command = [sys.executable, "-m", "xtrain", "check", "model.py:Model", "--init", "width=1", "--batch", "8x4"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 100
    while "sleep 4713" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert (process.returncode, told) == (130, "interrupted; nothing is left running\n")
    assert "sleep 4713" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


# ---------------------------------------------------------------- in code


def test_trainer_checks_what_is_in_memory_and_changes_nothing():
    module = Plain()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    report = Trainer("cpu", enable_progress_bar=False).check(module, DATA, checks=["protocol", "module"])
    assert (report.status, report.findings, report.module) == (0, [], "Plain")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module._trainer is None


def test_helper_of_tests_fails_with_the_screen():
    with pytest.raises(AssertionError, match="XT-RUN-06"):
        rehearse_in_test(Plain(lambda: 1 / 0), DATA, checks=["protocol"])
    assert rehearse_in_test(Plain(), DATA, checks=["protocol"]).status == 0


def test_module_that_cannot_be_made_is_an_error(tmp_path):
    path = write(tmp_path)
    with pytest.raises(RehearsalError, match="width"):
        rehearse_in_test(f"{path}:Model", batch="8x4")


class Ours(Check):
    name, ids = "ours", {"OUR-01": "warning"}

    def run(self, request):
        trainer = request.subject.fit(request.subject.module(), request.steps)
        yield Finding("OUR-01", f"{trainer.global_step} steps")


class Faulty(Check):
    name, ids = "faulty", {}

    def run(self, request):
        raise RuntimeError("my own fault")


@pytest.mark.parametrize("check", [Ours, Faulty], ids=["ours", "faulty"])
def test_a_check_of_another_package_runs_and_its_own_fault_exits_with_2(monkeypatch, check):
    from xtrain.rehearsal import registry
    from xtrain.rehearsal import rehearse as package

    monkeypatch.setattr(registry, "all_checks", lambda: ([check], []))
    monkeypatch.setitem(package.__globals__, "all_checks", lambda: ([check], []))
    monkeypatch.setitem(sys.modules, check.__module__, sys.modules[__name__])
    report = rehearse(Source("Plain"), Settings(steps=3), in_memory(Plain(), DATA))
    if check is Ours:
        assert [(f.id, f.severity, f.message) for f in report.findings] == [("OUR-01", "warning", "3 steps")]
    else:
        assert (report.status, report.failed) == (2, ["faulty"])
        assert "my own fault" in report.skipped[0].reason
