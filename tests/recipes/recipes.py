"""Imports the recipes as a launcher does, runs them, and reads what they print."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"

# Flags of a form that takes seconds, and the pictures it ends with.
SHORT = {
    "gan": (("--epochs", 2), ("rows.png", "digits.png", "losses.png")),
    "wgan_gp": (("--epochs", 2), ("wgan_gp.png", "wgan_gp-digits.png")),
    "ppo": (("--steps", 2), ("ppo-CartPole-v1.png",)),
    "sparse_coding": (("--epochs", 1), ("sparse_coding.png",)),
    "cyclegan": (("--epochs", 2), ("cyclegan.png",)),
    "byol": (("--epochs", 2), ("byol.png",)),
    "maml": (("--steps", 150), ("maml.png",)),
    "pinn": (("--adam", 20, "--lbfgs", 2), ("pinn.png",)),
}


def load(name):
    """Return the module `name` of the examples."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


def run(name, folder, *flags, monkeypatch):
    """Run the short form of a recipe in this process; its pictures are in `folder`."""
    short, pictures = SHORT[name]
    arguments = [str(flag) for flag in (*short, "--out", folder, *flags)]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    load(name).main()
    for picture in pictures:
        assert (folder / picture).stat().st_size > 500


def numbers(output, row):
    """Return the numbers of the line that begins with `row`."""
    line = next(line for line in output.splitlines() if line.strip().startswith(row))
    return [float(number) for number in re.findall(r"\d[\d.]*(?:e[-+]\d+)?", line.strip().removeprefix(row))]
