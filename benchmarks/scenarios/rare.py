"""The first token of a rare adapter while a hot one floods the queue, beside its first token on an idle server."""

from __future__ import annotations

import asyncio
import time

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
            report[engine.name] = asyncio.run(measure(up, flood, probes))
    yield {"flood": flood, "probes": probes, "engines": report}


async def measure(up: Server, flood: int, probes: int) -> Report:
    client = Client(up.url, up.dialect, began=time.perf_counter())
    for adapter in (HOT, RARE):
        await client.ask(prompts(SHAPE, adapter)[0], adapter, 2)
    alone = [await probe(client, number) for number in range(probes)]
    work = [asyncio.create_task(keep_asking(client, place)) for place in range(flood)]
    await asyncio.sleep(2)
    under = [await probe(client, probes + number) for number in range(probes)]
    for task in work:
        task.cancel()
    done = await asyncio.gather(*work, return_exceptions=True)
    failed = [str(one) for one in done if not isinstance(one, asyncio.CancelledError)]
    return {"failed": failed, "alone": summary(alone), "under the flood": summary(under)}


async def probe(client: Client, number: int) -> float:
    return (await client.ask(prompts(SHAPE, 1000 + number)[0], RARE, PROBE_NEW)).first_token_s


async def keep_asking(client: Client, place: int) -> None:
    number = 0
    while True:
        number += 1
        await client.ask(prompts(SHAPE, 100_000 * (place + 1) + number)[0], HOT, SHAPE.new)


def summary(firsts: list[float]) -> Report:
    return {"first_token_p50_s": percentile(firsts, 50), "first_token_p99_s": percentile(firsts, 99)}


SCENARIO = Scenario("rare", "rare adapter under a flood", run)
