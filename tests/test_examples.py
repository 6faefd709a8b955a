"""The example trains, learns, writes its pictures, and can be started in every way a launcher may choose."""

import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from xtrain import ConfigurationError, UnknownBackendError

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "gan.py"


@pytest.fixture(scope="module")
def gan():
    """Import the script as a launcher does: by name, without running its ``__main__`` block."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import gan
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return gan


@pytest.fixture(scope="module")
def common(gan):
    """The module beside it, which it has imported."""
    return sys.modules["common"]


def run_main(gan, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gan.py", *map(str, arguments)])
    gan.main()


def figures(output: str, row: str) -> list[float]:
    """Return the numbers in one row of the final table."""
    line = next(line for line in output.splitlines() if line.startswith(row))
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


def test_it_learns_and_shows_it(gan, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run_main(gan, monkeypatch, "--epochs", 14, "--out", tmp_path / "new" / "folder")
    output = capsys.readouterr()
    before, after, real = figures(output.out, "recognised as their class")
    assert before < 30
    assert after > 70
    assert real > 94
    before, after, real = figures(output.out, "Fréchet distance")
    assert before > 4 * after > 4 * real
    assert "better than real ones" in output.out
    assert re.search(r"Epoch 9/14 \d+/308, loss_g=.* \[\d\d:\d\d\]", output.err)  # of all epochs, with the time left
    assert output.err.count("\n") < 14  # one bar, drawn over

    grid = plt.imread(tmp_path / "new" / "folder" / "digits.png")
    assert grid.shape[:2] == (600, 600)
    assert grid[..., 0].std() > 0.2  # ink on paper
    assert plt.imread(tmp_path / "new" / "folder" / "rows.png").shape[0] > 150
    assert plt.imread(tmp_path / "new" / "folder" / "losses.png").shape[0] > 300


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_every_precision(gan, monkeypatch, tmp_path, capsys, precision):
    run_main(gan, monkeypatch, "--epochs", 1, "--precision", precision, "--out", tmp_path)
    before, after, _ = figures(capsys.readouterr().out, "Fréchet distance")
    assert after < 0.9 * before


def test_the_seed_decides(gan, monkeypatch, tmp_path, capsys):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_main(gan, monkeypatch, "--epochs", 1, "--seed", seed, "--out", tmp_path / folder)
    a, b, c = (plt.imread(tmp_path / folder / "digits.png") for folder in "abc")
    assert (a == b).all()
    assert (a != c).any()


def test_the_judge_knows_digits(common):
    train, held_out = common.load_split()
    judge = common.Judge(train)
    images, labels = held_out.tensors
    assert len(images) == 360
    assert len(train.tensors[0]) == 1437
    assert judge.accuracy(images, (labels + 1) % 10) < 0.05 < 0.94 < judge.accuracy(images, labels)
    assert judge.distance(images, images) == pytest.approx(0, abs=1e-3)
    assert judge.distance(images, -images) > 100


def test_digits_are_drawn_in_columns_of_their_class(common, tmp_path):
    images = torch.full((100, 1, 8, 8), -1.0)
    images[3::10] = 1.0  # every sample of class 3 is black
    common.draw_images(images, tmp_path / "grid.png")
    dark = plt.imread(tmp_path / "grid.png")[..., 0] < 0.5
    assert dark[:, 180:240].mean() == pytest.approx(0.64)
    assert dark.mean() == pytest.approx(0.064)


@pytest.mark.parametrize(
    ("flag", "value", "error", "message"),
    [
        ("--backend", "cpo", UnknownBackendError, "'cpo'"),
        ("--precision", "8", ConfigurationError, "Received: '8'"),
        ("--epochs", "-2", ConfigurationError, "max_epochs"),
        ("--backend-option", "stage=2", ConfigurationError, "stage"),
        ("--backend-option", "stage", SystemExit, "expected key=value"),
    ],
)
def test_bad_flags_are_told(gan, monkeypatch, tmp_path, capsys, flag, value, error, message):
    with pytest.raises(error) as raised:
        run_main(gan, monkeypatch, flag, value, "--out", tmp_path / "none")
    assert message in str(raised.value) + capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_options_of_the_backend_are_read_as_json(common):
    assert common.read_option("pin_memory=false") == ("pin_memory", False)
    assert common.read_option("stage=2") == ("stage", 2)
    assert common.read_option("config=zero.json") == ("config", "zero.json")
