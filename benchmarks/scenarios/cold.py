"""The first token of an adapter that was never loaded, beside that of a resident one, while eight others stream.

Warm and cold probes alternate. The others' gaps between tokens that a probe overlaps stand beside each other, too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from itertools import pairwise

from benchmarks.adapters import loras
from benchmarks.engines.over_http import Server
from benchmarks.load import Answer, Client, Prompt, percentile, prompts
from benchmarks.load import Load as Shape
from benchmarks.scenarios.scenario import Bench, Report, Reports, Scenario

STREAMS, PROBES = 8, 50
PROBE = Shape(requests=1, prompt=128, new=2, at_once=1)
STREAM = Shape(requests=1, prompt=16, new=256, at_once=1)


def run(bench: Bench) -> Reports:
    streams, probes = bench.few(STREAMS), bench.few(PROBES)
    report = {}
    for engine in bench.ours:
        room = bench.room / engine.name
        room.mkdir()
        with engine.start(bench.base, loras(bench.base, streams + probes), room) as up:
            report[engine.name] = asyncio.run(measure(up, streams, probes))
    yield {"streams": streams, "probes": probes, "engines": report}


async def measure(up: Server, streams: int, probes: int) -> Report:
    """Adapters below `streams` are warm; each probe of one beyond them is its first."""
    client = Client(up.url, up.dialect, began=time.perf_counter())
    for warm in range(streams):
        await client.ask(_prompt(PROBE, warm), warm, 2)
    others: list[list[float]] = []
    work = [asyncio.create_task(keep_streaming(client, warm, others)) for warm in range(streams)]
    await asyncio.sleep(1)
    found: dict[str, list[Answer]] = {"warm": [], "cold": []}
    for number in range(probes):
        for kind, asked in (("warm", number % streams), ("cold", streams + number)):
            found[kind].append(await client.ask(_prompt(PROBE, 1000 + 2 * number + (kind == "cold")), asked, PROBE.new))
    for task in work:
        task.cancel()
    done = await asyncio.gather(*work, return_exceptions=True)
    failed = [str(one) for one in done if not isinstance(one, asyncio.CancelledError)]
    return {"failed": failed, **{kind: summary(answers, others) for kind, answers in found.items()}}


async def keep_streaming(client: Client, asked: int, others: list[list[float]]) -> None:
    """Adds the arrivals of each stream to `others`, as they come."""
    number = 0
    while True:
        number += 1
        others.append([])
        await client.ask(_prompt(STREAM, 10_000 * (asked + 1) + number), asked, STREAM.new, others[-1])


def summary(probes: Sequence[Answer], others: Sequence[Sequence[float]]) -> Report:
    firsts = [one.first_token_s for one in probes]
    spans = [(one.asked_at, one.arrivals[0]) for one in probes]
    gaps = [
        later - earlier
        for other in others
        for earlier, later in pairwise(other)
        if any(earlier < end and later > begin for begin, end in spans)
    ]
    return {
        "first_token_p50_s": percentile(firsts, 50),
        "first_token_p99_s": percentile(firsts, 99),
        "others_gap_p99_s": percentile(gaps, 99) if gaps else None,
        "others_gaps": len(gaps),
    }


def _prompt(shape: Shape, seed: int) -> Prompt:
    return prompts(shape, seed)[0]


SCENARIO = Scenario("cold", "cold adapter (rank 8) from disk", run)
