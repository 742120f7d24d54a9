"""The first token of a rare adapter while a hot one floods the queue, beside its first token on an idle server.

In every round first the one, then the other; percentiles are of the probes of all rounds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from benchmarks.adapters import loras
from benchmarks.engines.over_http import Server
from benchmarks.load import Client, Load, percentile, prompts
from benchmarks.scenarios.scenario import Bench, Report, Reports, Scenario

HOT, RARE = 0, 1
FLOOD, PROBES = 128, 30  # requests of the hot adapter outstanding at any time; probes of the rare one
PLACES = 16  # in the batch: most of the flood waits
SHAPE = Load(requests=1, prompt=128, new=64, at_once=1)
PROBE_NEW = 4


def run(bench: Bench) -> Reports:
    flood, probes = bench.few(FLOOD), bench.few(PROBES)
    report = {}
    for engine in bench.ours:
        room = bench.room / engine.name
        room.mkdir()
        placed = engine.with_options({"max-running": min(PLACES, max(1, flood // 2))})
        with placed.start(bench.base, loras(bench.base, 2), room) as up:
            seen = Seen()
            for _ in range(bench.rounds):
                asyncio.run(measure(up, flood, probes, seen))
                report[engine.name] = seen.report()
                yield {"flood": flood, "probes": probes, "engines": report}


@dataclass
class Seen:
    """First tokens, in seconds. `seeds`: no prompt comes twice."""

    alone: list[float] = field(default_factory=list)
    under: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    seeds: Iterator[int] = field(default_factory=count)

    def report(self) -> Report:
        return {"failed": self.failed, "alone": summary(self.alone), "under the flood": summary(self.under)}


async def measure(up: Server, flood: int, probes: int, seen: Seen) -> None:
    client = Client(up.url, up.dialect, began=time.perf_counter())
    for adapter in (HOT, RARE):
        await client.ask(prompts(SHAPE, next(seen.seeds))[0], adapter, 2)
    for _ in range(probes):
        seen.alone.append(await probe(client, seen.seeds))
    work = [asyncio.create_task(keep_asking(client, seen.seeds)) for _ in range(flood)]
    await asyncio.sleep(2)
    for _ in range(probes):
        seen.under.append(await probe(client, seen.seeds))
    for task in work:
        task.cancel()
    done = await asyncio.gather(*work, return_exceptions=True)
    seen.failed += [str(one) for one in done if not isinstance(one, asyncio.CancelledError)]


async def probe(client: Client, seeds: Iterator[int]) -> float:
    return (await client.ask(prompts(SHAPE, next(seeds))[0], RARE, PROBE_NEW)).first_token_s


async def keep_asking(client: Client, seeds: Iterator[int]) -> None:
    while True:
        await client.ask(prompts(SHAPE, next(seeds))[0], HOT, SHAPE.new)


def summary(firsts: list[float]) -> Report:
    return {"first_token_p50_s": percentile(firsts, 50), "first_token_p99_s": percentile(firsts, 99)}


SCENARIO = Scenario("rare", "rare adapter under a flood", run)
