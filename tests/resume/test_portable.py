"""A training that moves between backends, numbers of processes and precisions is the training that stayed."""

from __future__ import annotations

import importlib.util
import itertools
from functools import cache, partial

import pytest
import segments
import torch
from segments import PARTITIONED, STEPS

from xtrain.testing.ranks import Ranks

# Name: backend, its options, processes.
PLACES = {
    "cpu": ("cpu", {}, 1),
    "cpu-2p": ("cpu", {}, 2),
    "zero0-2p": ("deepspeed", {"stage": 0}, 2),
    "zero1-2p": ("deepspeed", {"stage": 1}, 2),
    "zero2": ("deepspeed", {"stage": 2}, 1),
    "zero2-2p": ("deepspeed", {"stage": 2}, 2),
    "zero3-2p": ("deepspeed", {"stage": 3, "config": PARTITIONED}, 2),
    "fsdp-2p": ("fsdp", {}, 2),
    "tpu": ("tpu", {}, 1),
}
NEEDS = {"deepspeed": "deepspeed", "tpu": "torch_xla"}
HERE = [name for name, (backend, _, _) in PLACES.items() if importlib.util.find_spec(NEEDS.get(backend, "torch"))]
PAIRS = [*itertools.permutations(HERE, 2)]
# Adding in another order changes the last digits of each step.
TOLERANCES = {"32-true": 1e-6, "bf16-mixed": 2e-2, "16-mixed": 2e-3, "bf16-true": 6e-2}


@pytest.fixture(scope="module")
def processes():
    made = {}

    def get(place):
        backend, _, count = PLACES[place]
        key = (count, backend == "tpu")
        if key not in made:
            made[key] = Ranks(count, segments.prepare_chip if backend == "tpu" else segments.prepare)
        return made[key]

    yield get
    for ranks in made.values():
        ranks.close()


def run(processes, place, precision, folder, stop, **saver):
    backend, options, _ = PLACES[place]
    return processes(place).run(partial(segments.train, backend, options, precision, str(folder), stop, saver=saver))[0]


@pytest.fixture(scope="module")
def never_stopped(processes, tmp_path_factory):
    @cache
    def result(place, precision):
        return run(processes, place, precision, tmp_path_factory.mktemp("whole") / "c", STEPS[-1])

    return result


def close(ours, theirs, tolerance):
    assert ours[1] == theirs[1]
    for name, value in theirs[0].items():
        torch.testing.assert_close(
            ours[0][name].double(), value.double(), rtol=tolerance, atol=tolerance, msg=lambda t, n=name: f"{n}: {t}"
        )


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=[f"{a}-to-{b}" for a, b in PAIRS])
def test_from_one_to_the_other_and_back(processes, never_stopped, tmp_path, first, second):
    for place, stop in zip(itertools.cycle((first, second)), STEPS, strict=False):
        result = run(processes, place, "32-true", tmp_path / "c", stop)
    close(result, never_stopped("cpu", "32-true"), TOLERANCES["32-true"])


def precisions(place):
    return ("32-true", "bf16-mixed", "bf16-true") if place in ("tpu", "fsdp-2p") else tuple(TOLERANCES)


@pytest.mark.parametrize(("place", "precision"), [(p, precision) for p in HERE for precision in precisions(p)])
def test_the_same_again_bit_by_bit(processes, never_stopped, tmp_path, place, precision):
    for stop in STEPS:
        result = run(processes, place, precision, tmp_path / "c", stop)
    close(result, never_stopped(place, precision), 0.0)


@pytest.mark.parametrize("place", [p for p in ("cpu-2p", "zero2-2p", "fsdp-2p") if p in HERE])
def test_written_in_the_background_to_an_object_store(processes, never_stopped, tmp_path, place):
    for stop in STEPS:
        folder = f"shelf://{tmp_path}/c" if stop != STEPS[1] else tmp_path / "c"  # the same one
        result = run(processes, place, "32-true", folder, stop, background=True, every_n_train_steps=1, save_top_k=-1)
    close(result, never_stopped(place, "32-true"), 0.0)


@pytest.mark.parametrize("place", [p for p in ("cpu", "zero2-2p", "zero3-2p", "tpu") if p in HERE])
@pytest.mark.parametrize(("low", "high"), [("bf16-true", "32-true"), ("bf16-mixed", "bf16-true")])
def test_another_precision(processes, never_stopped, tmp_path, place, low, high):
    """What was saved in one goes on in another, as near to fp32 as the lower one allows."""
    for precision, stop in zip((low, high, low, high), STEPS, strict=True):
        result = run(processes, place, precision, tmp_path / "c", stop)
    close(result, never_stopped("cpu", "32-true"), TOLERANCES["bf16-true"])
