"""Threads that work beside the engine and keep to one core each.

A product of torch's takes every core that it may have, whoever asks for it. Beside a step that does the same, both wait
for each other at every operation: what takes 60 ms alone was seen to take 14 s on two cores. How many cores a thread's
operations take is a setting of that thread, made here once.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class QuietThreads:
    """`count` threads. To be made before the engine runs: torch gives what was set last to threads that begin."""

    def __init__(self, count: int) -> None:
        cores = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(count, "adapter-load", initializer=_keep_to_one_core)
        together = threading.Barrier(count + 1)
        for _ in range(count):
            self._pool.submit(together.wait)
        together.wait()
        torch.set_num_threads(cores)

    async def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """As `asyncio.to_thread`."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: work(*args, **kwargs))


def _keep_to_one_core() -> None:
    torch.get_num_threads()  # a thread takes over what was set for all when it asks first, also after it was set here
    torch.set_num_threads(1)
