"""Processes for tests of several ranks: starting one costs seconds, sending it a job does not."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from typing import Any

WAIT = 120.0


class Ranks:
    """`count` processes with the environment that torchrun gives; `run` sends all of them a job.

    Args:
        count: how many.
        prepare: called once in each process; it can be pickled.
    """

    def __init__(self, count: int, prepare: Callable[[], None] | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, count, port, prepare), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, job: Callable[..., Any], wait: float = WAIT) -> list[Any]:
        """Return what ``job(world_size=..., rank=...)`` returned on every rank, or raise what it raised.

        Args:
            job: can be pickled, as well as what it returns.
            wait: seconds after which a rank that has not answered counts as dead.

        Raises:
            TimeoutError: if a rank does not answer; the processes are ended then.
        """
        for pipe in self._pipes:
            pipe.send(job)
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(wait):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer within {wait:.0f} s")
            answers.append(pipe.recv())
        for _, _, warned in answers[:1]:
            for category, text in warned:
                warnings.warn(text, category, stacklevel=2)
        for result, text, _ in answers:
            if isinstance(result, Exception):
                raise result from RuntimeError(text)
        return [result for result, _, _ in answers]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.terminate()
            process.join()


def _serve(pipe: Any, rank: int, count: int, port: int, prepare: Callable[[], None] | None) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    import torch

    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
        gc.freeze()  # what was imported is not looked through again by every collection
    while True:
        job = pipe.recv()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result, text = job(world_size=count, rank=rank), ""
            except Exception as error:  # the test sees it
                result, text = error, traceback.format_exc()
        pipe.send((result, text, [(w.category, str(w.message)) for w in caught]))
