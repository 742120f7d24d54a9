"""The load that every engine gets: who asks for what, the client over HTTP, and what one round of it gave.

The client shares the cores with what it measures, so it is small: one connection a request, read line by line, and no
JSON but the last line's. Fresh random prompts each round, so that no cache of prefixes answers.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol
from urllib.parse import urlsplit

from benchmarks.bases import BYTES, VOCABULARY

Prompt = list[int]
Asked = int | None  # the number of an adapter; None: the base
ZIPF_EXPONENT = 1.0
LINE_LIMIT = 1 << 24  # bytes


class LoadFailed(Exception):
    """An engine that answered with an error, or with fewer tokens than it was asked for."""


@dataclass(frozen=True)
class Load:
    """Greedy, the end token ignored. Units: tokens. What is not done by its timeout has failed."""

    requests: int
    prompt: int
    new: int
    at_once: int
    timeout_s: float = 900.0


W1 = Load(requests=32, prompt=128, new=64, at_once=16)
W2 = Load(requests=1, prompt=128, new=128, at_once=1)


@dataclass(frozen=True)
class Answer:
    """One request. Units: seconds; `arrivals` are since the round began, one for each piece of the stream."""

    asked_at: float
    arrivals: Sequence[float]
    tokens: int

    @property
    def first_token_s(self) -> float:
        return self.arrivals[0] - self.asked_at

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.arrivals)]


@dataclass(frozen=True)
class Round:
    """One load's figures. Units: tokens per second over all requests, seconds. None: the answers came whole."""

    tokens_per_s: float
    wall_s: float
    first_token_mean_s: float | None = None
    first_token_p50_s: float | None = None
    first_token_p99_s: float | None = None
    gap_p50_s: float | None = None
    gap_p99_s: float | None = None


class Dialect(Protocol):
    """How an engine is asked over HTTP, and which lines of its stream are tokens."""

    @property
    def path(self) -> str: ...

    @property
    def count(self) -> bytes:
        """What only the event holds that counts the answer's tokens."""

    def body(self, prompt: Prompt, asked: Asked, new: int) -> dict[str, Any]: ...

    def is_piece(self, event: bytes) -> bool: ...

    def tokens(self, event: dict[str, Any]) -> int:
        """Of the event that counts them."""


def prompts(load: Load, seed: int) -> list[Prompt]:
    """Of whole texts only: no bytes, no end token."""
    rng = random.Random(seed)
    return [[rng.randrange(BYTES, VOCABULARY - 1) for _ in range(load.prompt)] for _ in range(load.requests)]


def identical(requests: int, adapters: int, seed: int) -> list[Asked]:
    del adapters, seed
    return [0] * requests


def distinct(requests: int, adapters: int, seed: int) -> list[Asked]:
    """In turn: no two of a batch alike while there are enough."""
    del seed
    return [number % adapters for number in range(requests)]


def uniform(requests: int, adapters: int, seed: int) -> list[Asked]:
    rng = random.Random(seed)
    return [rng.randrange(adapters) for _ in range(requests)]


def zipf(requests: int, adapters: int, seed: int) -> list[Asked]:
    """The k-th adapter is asked for in proportion to 1 / k."""
    rng = random.Random(seed)
    weights = [1 / (rank + 1) ** ZIPF_EXPONENT for rank in range(adapters)]
    return list(rng.choices(range(adapters), weights, k=requests))


POPULARITY: dict[str, Callable[[int, int, int], list[Asked]]] = {
    "identical": identical,
    "uniform": uniform,
    "zipf": zipf,
    "distinct": distinct,
}


@dataclass
class Client:
    """Streams from one server."""

    url: str
    dialect: Dialect
    began: float = field(default_factory=time.perf_counter)

    async def ask(self, prompt: Prompt, asked: Asked, new: int, arrivals: list[float] | None = None) -> Answer:
        """`arrivals` grows as pieces come, for who wants those of an answer that never ends. Raises: LoadFailed."""
        place = urlsplit(self.url)
        body = json.dumps(self.dialect.body(prompt, asked, new)).encode()
        head = (
            f"POST {self.dialect.path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        asked_at = time.perf_counter() - self.began
        reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=LINE_LIMIT)
        try:
            writer.write(head.encode() + body)
            status = await reader.readline()
            if b" 200 " not in status:
                raise LoadFailed(f"{status.decode().strip()} {(await reader.read(2000)).decode(errors='replace')}")
            return await self._read(reader, asked_at, new, [] if arrivals is None else arrivals)
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, asked_at: float, new: int, arrivals: list[float]) -> Answer:
        tokens = None
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            if self.dialect.is_piece(line):
                arrivals.append(time.perf_counter() - self.began)
            if self.dialect.count in line:
                tokens = self.dialect.tokens(json.loads(line[len(b"data: ") :]))
        if tokens != new or not arrivals:
            raise LoadFailed(f"asked for {new} tokens, got {tokens} in {len(arrivals)} pieces")
        return Answer(asked_at, arrivals, tokens)

    async def run(self, load: Load, asked: Sequence[Asked], seed: int) -> list[Answer]:
        """`load.at_once` requests at any time, in order."""
        places = asyncio.Semaphore(load.at_once)

        async def one(prompt: Prompt, adapter: Asked) -> Answer:
            async with places:
                return await self.ask(prompt, adapter, load.new)

        work = (one(prompt, adapter) for prompt, adapter in zip(prompts(load, seed), asked, strict=True))
        try:
            async with asyncio.timeout(load.timeout_s):
                return list(await asyncio.gather(*work))
        except TimeoutError:
            raise LoadFailed(f"not done within {load.timeout_s:g} s") from None


def measure(client: Client, load: Load, asked: Sequence[Asked], seed: int) -> Round:
    client.began = began = time.perf_counter()
    answers = asyncio.run(client.run(load, asked, seed))
    return figures(answers, time.perf_counter() - began)


def figures(answers: Sequence[Answer], wall_s: float) -> Round:
    firsts = [answer.first_token_s for answer in answers]
    gaps = [gap for answer in answers for gap in answer.gaps_s]
    return Round(
        tokens_per_s=sum(answer.tokens for answer in answers) / wall_s,
        wall_s=wall_s,
        first_token_mean_s=statistics.mean(firsts),
        first_token_p50_s=percentile(firsts, 50),
        first_token_p99_s=percentile(firsts, 99),
        gap_p50_s=percentile(gaps, 50) if gaps else None,
        gap_p99_s=percentile(gaps, 99) if gaps else None,
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent are not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
