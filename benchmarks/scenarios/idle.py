"""The step of 16 running streams with 1,000 requests queued behind them and 10,000 adapters in the hub, beside without.

The step is the median gap between tokens, of the same places of the answers in both. Two servers take turns, round by
round, the other one stopped meanwhile.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import ExitStack, suppress
from dataclasses import replace

import httpx

from benchmarks.adapters import loras
from benchmarks.engines.ours import fill_hub
from benchmarks.engines.over_http import Server
from benchmarks.load import Answer, Client, Load, prompts
from benchmarks.registry import fill
from benchmarks.scenarios.scenario import Bench, Report, Reports, Scenario

STREAMS, QUEUED, NAMES = 16, 1000, 10_000
RUNNING = Load(requests=STREAMS, prompt=16, new=384, at_once=STREAMS)
SHORT_NEW = 96  # when it is to be short: until all is queued
WAITING = Load(requests=QUEUED, prompt=16, new=4, at_once=QUEUED)
QUEUE_TIMEOUT_S = 120


def run(bench: Bench) -> Reports:
    streams, queued, names = bench.few(STREAMS), bench.few(QUEUED), bench.few(NAMES)
    adapters = loras(bench.base, streams)
    running = replace(RUNNING, requests=streams, new=SHORT_NEW if bench.short else RUNNING.new, at_once=streams)
    report: Report = {"queued": queued, "names": names, "engines": {}}
    for engine in bench.ours:
        rooms = {waiting: bench.room / engine.name / waiting for waiting in ("without", "with")}
        placed = engine.with_options({"max-running": streams, "max-waiting": queued + streams})
        steps: dict[str, list[float]] = {waiting: [] for waiting in rooms}
        for room in rooms.values():
            room.mkdir(parents=True)
            served = fill_hub(room / "home", bench.base, adapters)
        fill(rooms["with"] / "home", names, adapters[0], bench.base.folder)
        with ExitStack() as stack:
            up: dict[str, Server] = {}
            for waiting, room in rooms.items():
                up[waiting] = stack.enter_context(placed.serve(bench.base, served, room))
                up[waiting].stop()
            for number in range(bench.rounds):
                for waiting, server in up.items():
                    server.go()
                    behind = queued if waiting == "with" else 0
                    answers, place = asyncio.run(stream(server, running, behind, number))
                    steps[waiting].append(step_s(answers, place))
                    server.stop()
                report["engines"][engine.name] = steps
                yield report


def step_s(answers: list[Answer], place: int) -> float:
    return statistics.median(gap for answer in answers for gap in answer.gaps_s[place:])


async def stream(up: Server, shape: Load, queued: int, seed: int) -> tuple[list[Answer], int]:
    """The streams' answers, and the place in them from which on everything was queued (where nothing is, a third)."""
    client = Client(up.url, up.dialect, began=time.perf_counter())
    running = [
        asyncio.create_task(client.ask(prompt, number, shape.new)) for number, prompt in enumerate(prompts(shape, seed))
    ]
    await asyncio.sleep(1)
    waiting = [
        asyncio.create_task(client.ask(prompt, number % shape.requests, WAITING.new))
        for number, prompt in enumerate(prompts(Load(queued, WAITING.prompt, WAITING.new, queued), seed + 1))
    ]
    if queued:
        await until_queued(up.url, queued)
    since = time.perf_counter() - client.began
    answers = list(await asyncio.gather(*running))
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    places = [sum(arrival < since for arrival in answer.arrivals) for answer in answers]
    if queued and max(places) > 0.9 * shape.new:
        raise RuntimeError("the streams ended before everything was queued")
    return answers, max(places) if queued else shape.new // 3


async def until_queued(url: str, queued: int) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=QUEUE_TIMEOUT_S) as client:
        with suppress(TimeoutError):
            async with asyncio.timeout(QUEUE_TIMEOUT_S):
                while await waiting_now(client) < queued:
                    await asyncio.sleep(0.5)


async def waiting_now(client: httpx.AsyncClient) -> int:
    text = (await client.get("/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith("vllm:num_requests_waiting")]
    return int(float(lines[0].split()[-1]))


SCENARIO = Scenario("idle", "1,000 idle requests queued, 10,000 adapters in the hub", run)
