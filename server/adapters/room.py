"""Room in the adapter cache, and the line of those that wait for it.

Whoever finds no room lets go of all it holds and tries again when there may be some. So nobody holds a lease while it
waits; those that hold one are at work and end, and no two wait for each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from server.errors import Unavailable

T = TypeVar("T")
WAIT_S = 30.0
PATIENCE_S = 1.0  # that the first in line waits before all that come stand behind it


class NoRoom(Exception):
    """So many bytes are not to be had now, beside what the same request holds by then; by digest."""

    def __init__(self, label: str, wanted: int, beside: dict[str, int] | None = None) -> None:
        super().__init__(f"{label} needs {wanted} bytes")
        self.label = label
        self.wanted = wanted
        self.beside = beside or {}

    @property
    def together(self) -> int:
        return self.wanted + sum(self.beside.values())


class Line:
    def __init__(self, size: int, is_likely: Callable[[NoRoom], bool]) -> None:
        """`size` is what the cache holds, in bytes; `is_likely` says whether what was missing could be had now."""
        self._size = size
        self._is_likely = is_likely
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()
        self._first_since: float | None = None

    def freed(self) -> None:
        """Something was let go."""
        self._freed.set()

    async def serve(self, work: Callable[[], Awaitable[T]]) -> T:
        """What `work` gives, begun anew whenever it raises `NoRoom`.

        Who comes tries at once, and stands in line if there is no room. Once the first in line has waited for
        `PATIENCE_S`, who comes stands behind it untried: popular adapters keep no other out for ever.
        Raises: Unavailable.
        """
        lacking: NoRoom | None = None
        now = asyncio.get_running_loop().time
        deadline = now() + WAIT_S
        if self._first_since is None or now() < self._first_since + PATIENCE_S:
            try:
                return await work()
            except NoRoom as error:
                lacking = error
        try:
            async with asyncio.timeout_at(deadline):
                await self._turn.acquire()
        except TimeoutError:
            raise self._full(lacking) from None
        self._first_since = now()
        try:
            while True:
                if lacking is not None:
                    await self._likely(lacking, deadline)
                try:
                    return await work()
                except NoRoom as error:
                    lacking = error
                    if now() >= deadline:
                        raise self._full(lacking) from None
        finally:
            self._first_since = None
            self._turn.release()

    async def _likely(self, lacking: NoRoom, deadline: float) -> None:
        while not self._is_likely(lacking):
            self._freed.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._freed.wait()
            except TimeoutError:
                raise self._full(lacking) from None

    def _full(self, lacking: NoRoom | None) -> Unavailable:
        what = "another adapter needs room" if lacking is None else str(lacking)
        return Unavailable(
            f"{what}, and everything in the adapter cache of {self._size} bytes is in use or pinned", retry_after_s=5.0
        )
