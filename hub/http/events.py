"""The event stream: everything that happens in the hub, as server-sent events numbered by the log.

A watcher says which event it saw last and misses none, also over a restart: the numbers are in the catalogue. One task
looks at the log for all watchers.
Source: WHATWG HTML, section 9.2.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from pydantic import TypeAdapter
from starlette.concurrency import run_in_threadpool

from hub.contract import Event
from hub.errors import HubError, HubUnavailable, LogLost
from hub.http.access import seen_events
from hub.keys import Principal
from hub.registry import WATCH_S, LocalHub

log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
BATCH = 500
_EVENT = TypeAdapter(Event)


class Watchers:
    """Whoever waits for events. `open` counts them; `follow` runs as long as the service does."""

    def __init__(self, hub: LocalHub, *, limit: int) -> None:
        self._hub = hub
        self._limit = limit
        self._moved = asyncio.Condition()
        self._head = 0
        self._closing = False
        self.open = 0

    async def follow(self) -> None:
        """Look at the log for ever, and wake everybody when it has grown."""
        while True:
            try:
                head = await run_in_threadpool(self._hub.head)
            except HubError as error:
                log.warning("the log cannot be read, trying again: %s", error)
                head = self._head
            if head != self._head:
                async with self._moved:
                    self._head = head
                    self._moved.notify_all()
            await asyncio.sleep(WATCH_S)

    async def close(self) -> None:
        """Let every stream end, so that its watcher comes back when this service does."""
        async with self._moved:
            self._closing = True
            self._moved.notify_all()

    async def check(self, after: int) -> None:
        """Raises: LogLost, HubUnavailable."""
        if self.open >= self._limit:
            raise HubUnavailable(f"{self.open} event streams are open, the limit is {self._limit}")
        head = await run_in_threadpool(self._hub.head)
        if after > head:
            raise LogLost(f"event {after} is beyond the last one of this hub, {head}")

    async def stream(self, after: int, asking: Principal) -> AsyncIterator[str]:
        """Events after a number that this principal may see, and a comment now and then to show that we live.

        It ends with the key: nothing is told that happened after a revocation.
        """
        self.open += 1
        try:
            yield ": watching\n\n"
            while not self._closing:
                found = await run_in_threadpool(self._hub.events, after, limit=BATCH)
                if await run_in_threadpool(self._hub.keys.is_over, asking):
                    return
                for event in seen_events(asking, found):
                    yield f"id: {event.seq}\nevent: {event.kind}\ndata: {_EVENT.dump_json(event).decode()}\n\n"
                if found:
                    after = found[-1].seq
                elif not await self._moves(after):
                    yield ": nothing new\n\n"
        finally:
            self.open -= 1

    async def _moves(self, after: int) -> bool:
        """Wait for an event beyond a number; False after a while without."""
        try:
            async with asyncio.timeout(HEARTBEAT_S), self._moved:
                await self._moved.wait_for(lambda: self._head > after or self._closing)
        except TimeoutError:
            return False
        return True
