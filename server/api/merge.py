"""Several async iterators as one, in the order in which their items come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TypeVar

from server.api.disconnect import cancel_all

T = TypeVar("T")


async def merge(sources: Sequence[AsyncIterator[T]]) -> AsyncGenerator[tuple[int, T], None]:
    """(index of the source, item). Ends when all have ended; the first error ends all."""
    if len(sources) == 1:  # the usual case, without a task and a queue between
        async for item in sources[0]:
            yield 0, item
        return
    arrived: asyncio.Queue[tuple[int, T] | None] = asyncio.Queue()

    async def drain(index: int, source: AsyncIterator[T]) -> None:
        try:
            async for item in source:
                arrived.put_nowait((index, item))
        finally:
            arrived.put_nowait(None)

    tasks = [asyncio.ensure_future(drain(index, source)) for index, source in enumerate(sources)]
    running = len(tasks)
    try:
        while running:
            numbered = await arrived.get()
            if numbered is not None:
                yield numbered
                continue
            running -= 1
            for task in tasks:
                if task.done() and not task.cancelled():
                    task.result()
    finally:
        await cancel_all(*tasks)
