"""The distillation of digits: the same parameters as a plain loop, and a short run of the script."""

import sys

import distilled
import matplotlib.pyplot as plt


def test_a_few_steps_are_those_of_a_plain_loop():
    received = distilled.by_trainer("cpu", None)
    distilled.assert_same(received, distilled.by_hand(), 1e-6)
    start = distilled.Distillation().state_dict()
    moved = {name.split(".")[0] for name, value in received.items() if not value.equal(start[name])}
    assert moved == {"student", "fake_score", "discriminator", "averages"}


def test_the_script_runs_and_shows_what_came_of_it(monkeypatch, tmp_path, capsys):
    arguments = ["--teacher-epochs", "2", "--epochs", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["dmd2.py", *arguments])
    distilled.dmd2.main()
    rows = {line[:20].strip(): line[20:].split() for line in capsys.readouterr().out.splitlines()}
    distances = [float(rows[name][1]) for name in ("teacher, 16 steps", "teacher, 1 step", "student, 1 step")]
    assert distances[0] < distances[2] < distances[1]
    for picture in ("dmd2.png", "dmd2-losses.png"):
        assert plt.imread(tmp_path / picture)[..., :3].std() > 0.1
