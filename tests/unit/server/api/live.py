"""The app behind a real port: uvicorn in a thread, as long as a test needs it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI

from server.api.app import create_app
from server.api.service import ServerInfo
from server.config import HttpConfig
from server.metrics import Metrics
from server.text.tokenizer import Tokenizer
from tests.unit.server.api.fakes import FakeAdapters, FakeEngine
from tests.unit.server.text.tokenizers_for_tests import byte_level

BASE = "sapling"
START_S = 10.0


@dataclass(frozen=True)
class Live:
    url: str
    app: FastAPI
    engine: FakeEngine
    adapters: FakeAdapters
    tokenizer: Tokenizer


@contextmanager
def serve(config: HttpConfig | None = None, *, base: str = BASE, chat: bool = True) -> Iterator[Live]:
    tokenizer = Tokenizer(byte_level(chat=chat))
    engine, adapters = FakeEngine(tokenizer), FakeAdapters()
    app = create_app(
        engine=engine,
        adapters=adapters,
        tokenizer=tokenizer,
        config=config or HttpConfig(),
        base_id=base,
        metrics=Metrics(),
        info=ServerInfo(version="0.0.test", started=1_700_000_000),
    )
    with listening(app) as url:
        yield Live(url, app, engine, adapters, tokenizer)


class _Quick(uvicorn.Server):
    """uvicorn that looks every few milliseconds, not every hundred, whether it is to stop."""

    async def main_loop(self) -> None:
        await self.on_tick(0)  # the headers that every answer has
        while not self.should_exit:
            await asyncio.sleep(0.005)


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    server = _Quick(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + START_S
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "uvicorn did not start"
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(START_S)


def wait_until(fact: object, *, within_s: float = 5.0) -> None:
    """Poll a callable until it is true."""
    assert callable(fact)
    deadline = time.monotonic() + within_s
    while not fact():
        assert time.monotonic() < deadline, f"not true within {within_s} s"
        time.sleep(0.005)
