"""Reads a checkpoint of Lightning 2, which is one file: what a training with manual optimization needs of it."""

from __future__ import annotations

from typing import Any

import torch

from xtrain.checkpoint.places import Place
from xtrain.errors import CheckpointError, explain


def read_lightning(path: Place, weights_only: bool | None = None) -> dict[str, Any]:
    """Return the checkpoint in a file of Lightning 2 as xtrain's own are read.

    Lightning counts a step per optimizer; the counters here are of its batches, which is what xtrain counts.

    Args:
        path: the file.
        weights_only: False lets the file run code, for one that holds objects. Never for a file of others.

    Raises:
        CheckpointError: if it is no such file, or holds more than tensors and plain values.
    """
    try:
        with path.open("rb") as file:
            saved = torch.load(file, map_location="cpu", weights_only=weights_only is not False)
    except Exception as error:  # pickle's, zipfile's, torch's: whatever the file is
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fix = "ckpt_path=... of your own file with weights_only=False, which runs what is in it"
        expected = f"{path} to hold tensors and plain values, as a checkpoint of Lightning"
        raise CheckpointError(explain(expected, reason, fix)) from error
    if not isinstance(saved, dict) or "state_dict" not in saved or "pytorch-lightning_version" not in saved:
        found = sorted(map(str, saved))[:5] if isinstance(saved, dict) else type(saved).__name__
        fix = "module.load_state_dict(torch.load(path)) for a file of weights alone"
        raise CheckpointError(explain("a checkpoint of xtrain or of Lightning 2", f"{path} with {found}", fix))
    loop = saved.get("loops", {}).get("fit_loop", {})
    epochs = loop.get("epoch_progress", {}).get("current", {})
    progress = loop.get("epoch_loop.batch_progress", {})
    batches = progress.get("current", {})
    steps = loop.get("epoch_loop.state_dict", {}).get("_batches_that_stepped", saved.get("global_step", 0))
    ready, done = int(epochs.get("ready", 0)), int(batches.get("processed", 0))
    if ready == int(epochs.get("completed", 0)) and (progress.get("is_last_batch") or not done):
        epoch, done = ready, 0
    else:  # inside of an epoch, or at its last batch before its end
        epoch = max(ready - 1, 0)
    if done and done > int(batches.get("completed", 0)):  # saved in a hook, where this batch is not counted yet
        steps += 1
    return {
        **saved,
        "epoch": epoch,
        "global_step": int(steps),
        "optimizer_states": list(saved.get("optimizer_states", [])),
        "lr_schedulers": list(saved.get("lr_schedulers", [])),
        "callbacks": {k: state for key, state in saved.get("callbacks", {}).items() for k in (key, _class_name(key))},
        "progress": {
            "batches": int(progress.get("total", {}).get("processed", done)),
            "done": done,
            "window": 0,
            "logged_steps": int(steps),
        },
        "data": {"batches": done, "samples_per_batch": None, "world_size": 1, "seeds": [], "portable": True},
        "loggers": [],
    }


def _class_name(key: str) -> str:
    """Return the class in a key of Lightning's, which goes on with its arguments."""
    return str(key).partition("{")[0]
