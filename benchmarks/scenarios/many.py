"""1,000 adapters, asked for by Zipf's law, under a budget of bytes that holds 64: beside the throughput of one adapter.

The adapters' files are in the page cache, so a cold one costs what fetching, checking and placing it costs.
"""

from __future__ import annotations

from benchmarks.adapters import WEIGHTS, loras
from benchmarks.contest import Contest, Turn
from benchmarks.load import Load
from benchmarks.scenarios.scenario import Bench, Reports, Scenario

ADAPTERS, RESIDENT = 1000, 64
ROOM = 1.1  # an adapter takes at most so much more than its file
LOAD = Load(requests=128, prompt=128, new=64, at_once=16)


def run(bench: Bench) -> Reports:
    load, folders = bench.cut(LOAD), loras(bench.base, bench.few(ADAPTERS))
    budget = int(min(RESIDENT, len(folders) // 2) * ROOM * (folders[0] / WEIGHTS).stat().st_size)
    engines = [one.with_options({"adapter-bytes": budget}) for one in bench.ours]
    turns = {"1 adapter": Turn(load, 1), "zipf": Turn(load, len(folders), "zipf")}
    for results in Contest(bench.base, folders, bench.room, bench.rounds).run(engines, turns):
        yield {"adapters": len(folders), "budget_bytes": budget, **results.as_json()}


SCENARIO = Scenario("many", "1,000 adapters, Zipf, budget of 64", run)
