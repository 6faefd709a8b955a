"""A training that expects to be killed: ``python survivor.py FOLDER --backend cpu --devices 1 --steps 60``.

It saves every other step and goes on with ``ckpt_path="last"``. A line ``saved N`` is printed after each checkpoint,
and ``done`` with a digest of all parameters at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import time
import warnings
from pathlib import Path

import torch
from segments import BATCH, Model, rows
from torch.utils.data import DataLoader

from xtrain import Callback, ModelCheckpoint, Trainer, seed_everything


class Announces(Callback):
    """Says what was saved; as another process would see it."""

    def __init__(self, saver, pause):
        self.saver, self.pause, self.told = saver, pause, ""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.is_global_zero and self.saver.last_model_path not in ("", self.told):
            self.told = self.saver.last_model_path
            print("saved", Path(self.told).name, flush=True)
        time.sleep(self.pause)


class Slow:
    """A dataset that loader workers read."""

    def __init__(self, pause):
        self.data, self.pause = rows(), pause

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        time.sleep(self.pause)
        return self.data[index]


class Validated(Model):
    """With a validation that takes a while."""

    def validation_step(self, batch, batch_idx):
        time.sleep(0.02)
        self.log("val", batch.mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--stage", type=int)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--validate", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seed_everything(6)
    module = Validated() if options.validate else Model()
    saver = ModelCheckpoint(options.folder, every_n_train_steps=options.every, every_n_epochs=0)
    saver.save_top_k = 2  # the newest and the one before it
    trainer = Trainer(
        backend=options.backend,
        backend_options=None if options.stage is None else {"stage": options.stage},
        devices=options.devices,
        max_steps=options.steps,
        callbacks=[saver, Announces(saver, options.pause)],
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        val_check_interval=4 if options.validate else None,
    )
    loader = DataLoader(
        Slow(0.0005) if options.workers else rows(),
        batch_size=BATCH // options.devices,
        shuffle=True,
        num_workers=options.workers,
    )
    print("started", flush=True)
    trainer.fit(module, loader, DataLoader(rows(), 4) if options.validate else None, ckpt_path="last")
    if trainer.is_global_zero:
        state = module.state_dict()
        whole = b"".join(state[name].detach().cpu().numpy().tobytes() for name in sorted(state))
        print("done", trainer.global_step, hashlib.sha256(whole).hexdigest(), flush=True)


if __name__ == "__main__":
    main()
