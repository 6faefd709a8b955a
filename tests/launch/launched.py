"""A script that trains on several processes and tells what came of it: started by the tests of launching."""

import argparse
import atexit
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from xtrain import Trainer, XTrainError, seed_everything
from xtrain.testing.experiments.clipping import ClippedGan
from xtrain.testing.networks import batches


class Trained(ClippedGan):
    """A GAN that may come to harm in the second batch, on one rank."""

    def __init__(self, harm: str, rank: int) -> None:
        super().__init__(0.2)
        self.harm, self.harmed = harm, rank

    def training_step(self, batch, batch_idx):
        if batch_idx == 1 and self.global_rank == self.harmed:
            harms[self.harm]()
        super().training_step(batch, batch_idx)


def raise_error():
    raise ValueError("on purpose")


def hang():
    time.sleep(600)


def interrupt():
    raise KeyboardInterrupt


harms = {
    "interrupt": interrupt,
    "none": lambda: None,
    "raise": raise_error,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: sys.exit(3),
    "hang": hang,
}


def read_option(text):
    name, _, value = text.partition("=")
    return name, float(value)


def fit(options):
    trainer = Trainer(
        options.backend,
        devices=options.devices,
        max_epochs=1,
        enable_progress_bar=False,
        backend_options=dict(options.option) or None,
    )
    module = Trained(options.harm, options.rank)
    trainer.fit(module, _Shares(trainer))
    if options.out:
        path = options.out / f"rank-{trainer.global_rank}.pt"
        parameters = {name: value.cpu() for name, value in module.state_dict().items()}
        torch.save({"world": trainer.world_size, **parameters}, path)
    heavy = [name for name in ("torch_xla", "deepspeed", "accelerate") if name in sys.modules]
    print(f"rank {trainer.global_rank} of {trainer.world_size} is done with {heavy}", flush=True)


class _Shares:
    """This rank's rows of the global batches; which they are is known once the processes are there."""

    def __init__(self, trainer) -> None:
        self.trainer = trainer

    def __len__(self) -> int:
        return 4

    def __iter__(self):
        return iter(batches(4, self.trainer.world_size, self.trainer.global_rank))


def tell_who_watches() -> None:
    """A thread that is inside torch when the interpreter ends aborts the process, now and then."""
    if any(thread.name == "xtrain-ranks" for thread in threading.enumerate()):
        print("the other ranks are still watched", flush=True)


def main() -> None:
    atexit.register(tell_who_watches)  # the first to register is the last to be called
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--devices", type=int)
    parser.add_argument("--harm", default="none", choices=harms)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--option", type=read_option, action="append", default=[], help="of the backend: timeout=3")
    parser.add_argument("--again", type=int, help="fit a second time on so many devices")
    parser.add_argument("--caught", action="store_true", help="go on after an error, and fit again")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    seed_everything(7)
    try:
        fit(options)
    except XTrainError:
        if not options.caught:
            raise
        fit(options)
    if options.again is not None:
        options.devices = options.again
        fit(options)


if __name__ == "__main__":
    main()
