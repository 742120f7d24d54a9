"""What every route works with, built once by `create_app` and never changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from server.config import HttpConfig
from server.contract import Adapters, Engine
from server.metrics import Metrics
from server.text.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What /version and /v1/models tell besides the adapters. `started` is in Unix seconds."""

    version: str
    started: int
    details: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Service:
    engine: Engine
    adapters: Adapters
    tokenizer: Tokenizer
    config: HttpConfig
    base_id: str
    metrics: Metrics
    info: ServerInfo
    text_thread: ThreadPoolExecutor  # exactly one worker: the tokenizer is not safe for two threads

    @property
    def base_names(self) -> frozenset[str]:
        return frozenset({self.base_id, self.config.served_name or self.base_id})

    async def in_text_thread(self, work: Callable[[], T]) -> T:
        """Long texts take long to encode; other requests go on meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self.text_thread, work)
