"""64 adapters asked for alike, one alone, by Zipf's law, and each in turn: throughput beside the bare base's."""

from __future__ import annotations

from benchmarks.adapters import loras
from benchmarks.contest import Contest, Turn
from benchmarks.load import POPULARITY, Load
from benchmarks.scenarios.scenario import Bench, Reports, Scenario

ADAPTERS = 64
LOAD = Load(requests=64, prompt=128, new=64, at_once=16)


def run(bench: Bench) -> Reports:
    load, count = bench.cut(LOAD), bench.few(ADAPTERS)
    turns = {"base": Turn(load), **{how: Turn(load, count, how) for how in POPULARITY}}
    contest = Contest(bench.base, loras(bench.base, count), bench.room, bench.rounds)
    for results in contest.run(bench.ours, turns):
        yield results.as_json()


SCENARIO = Scenario("popularity", "popularity of 64 adapters: identical, uniform, Zipf, distinct", run)
