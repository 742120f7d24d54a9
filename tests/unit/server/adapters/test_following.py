"""What an alias serves when it moves at a bad moment: while it is first asked for, or while the hub is away."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

import pytest

from server.adapters.source import Artifact, Happened, Resolution
from server.adapters.store import AdapterStore
from server.errors import Unavailable
from tests.unit.server.adapters.test_churn import MadeSource, made_store


class MovingSource(MadeSource):
    """One name whose alias moves; an answer can be held back after it was read, and the hub can be away."""

    def __init__(self) -> None:
        super().__init__()
        self.version = self.seq = 1
        self.away = False
        self.answer = threading.Event()
        self.answer.set()
        self.asked = threading.Event()
        self.handled = threading.Event()  # the watcher has asked for more, so it has dealt with all that it was told
        self._known: Resolution | None = None
        self._told: queue.SimpleQueue[Sequence[Happened] | None] = queue.SimpleQueue()

    def resolve(self, text: str) -> Resolution:
        if self.away:
            assert self._known is not None
            return self._known
        made = Resolution("7", self.version, f"sha256:{self.version:064x}", "latest")
        self._known = Resolution(made.name, made.version, made.digest, made.alias, remembered=True)
        self.asked.set()
        assert self.answer.wait(10)
        return made

    def fetch(self, resolution: Resolution) -> Artifact:
        if self.away:
            raise Unavailable("away", retry_after_s=1.0)
        return super().fetch(resolution)

    def move(self, version: int) -> None:
        self.version = version
        self.seq += 1
        self._told.put([Happened(self.seq, "7")])

    def go_away(self) -> None:
        self.away = True
        self._told.put(None)

    def head(self) -> int:
        if self.away:
            raise Unavailable("away", retry_after_s=1.0)
        return self.seq

    def watch(self, after: int) -> Iterator[Sequence[Happened]]:
        if self.away:
            raise Unavailable("away", retry_after_s=1.0)
        if self.seq > after:
            yield [Happened(self.seq, "7")]
        while True:
            yield []
            self.handled.set()
            events = self._told.get()
            if events is None:
                raise Unavailable("away", retry_after_s=1.0)
            yield events


async def version(store: AdapterStore) -> int:
    lease = await store.acquire([("7", 1.0)])
    lease.release()
    return lease.mixture.terms[0].version


async def serves(store: AdapterStore, wanted: int) -> None:
    async with asyncio.timeout(10):
        while await version(store) != wanted:
            await asyncio.sleep(0.01)


async def reachable(store: AdapterStore, wanted: bool) -> None:
    async with asyncio.timeout(10):
        while store.hub().reachable is not wanted:
            await asyncio.sleep(0.01)


def watched(store: AdapterStore, work: Coroutine[Any, Any, None]) -> None:
    async def both() -> None:
        watching = asyncio.create_task(store.watch())
        try:
            await work
        finally:
            watching.cancel()

    asyncio.run(asyncio.wait_for(both(), 60))


def test_an_alias_that_moves_while_it_is_first_asked_for_serves_its_new_version() -> None:
    source = MovingSource()
    store = made_store(source)

    async def work() -> None:
        assert await asyncio.to_thread(source.handled.wait, 10)
        source.answer.clear()
        source.asked.clear()
        first = asyncio.create_task(version(store))
        assert await asyncio.to_thread(source.asked.wait, 10)  # the hub has said 1, and the answer is on its way
        source.handled.clear()
        source.move(2)
        assert await asyncio.to_thread(source.handled.wait, 10)
        await asyncio.sleep(0.05)  # what was handed over is dealt with
        source.answer.set()
        await first
        await serves(store, 2)

    watched(store, work())


@pytest.mark.parametrize("asked_before", [True, False], ids=["in use", "remembered from another life"])
def test_an_alias_that_moved_while_the_hub_was_away_is_caught_up_with(asked_before: bool) -> None:
    source = MovingSource()
    source.resolve("7")
    store = made_store(source)

    async def work() -> None:
        assert await asyncio.to_thread(source.handled.wait, 10)
        await reachable(store, True)
        await store.warm("7")  # so that its bytes are here; without a hub nothing is fetched
        if not asked_before:
            store._pointers.clear()
        source.go_away()
        await reachable(store, False)
        assert await version(store) == 1
        if asked_before:
            source.move(2)
        else:
            source.version = 2  # by an event that the watcher has seen, when the name was not in use
        source.away = False
        await reachable(store, True)
        await serves(store, 2)

    watched(store, work())


def test_an_event_that_cannot_be_asked_about_is_not_lost() -> None:
    """The hub tells of a move and goes away before it is asked where the alias points."""
    source = MovingSource()
    store = made_store(source)

    async def work() -> None:
        assert await version(store) == 1
        assert await asyncio.to_thread(source.handled.wait, 10)
        source.away = True
        source.move(2)
        await reachable(store, False)
        assert await version(store) == 1
        source.away = False
        await serves(store, 2)

    watched(store, work())
