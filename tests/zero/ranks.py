"""Processes that stay between tests: starting one costs seconds, sending it a job does not."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

WAIT = 120.0
"""Seconds after which a job that has not answered is taken for dead."""


class Ranks:
    """`count` processes with the environment that torchrun gives; `run` sends all of them a job.

    Args:
        count: how many.
        prepare: called once in each process.
    """

    def __init__(self, count: int, prepare: Callable[[], None] | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(count):
            here, there = context.Pipe()
            arguments = (there, rank, count, port, prepare)
            self.processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            self.pipes.append(here)
        for process in self.processes:
            process.start()

    def run(self, job: Callable[..., Any]) -> list[Any]:
        """Return what ``job(world_size=..., rank=...)`` returned on every rank, or raise what it raised."""
        for pipe in self.pipes:
            pipe.send(job)
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(WAIT):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer within {WAIT:.0f} s")
            answers.append(pipe.recv())
        for result, text in answers:
            if isinstance(result, Exception):
                raise result from RuntimeError(text)
        return [result for result, _ in answers]

    def close(self) -> None:
        for process in self.processes:
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
        try:
            pipe.send((job(world_size=count, rank=rank), ""))
        except Exception as error:  # the test sees it
            pipe.send((error, traceback.format_exc()))
