"""W1: 32 requests of 128 prompt and 64 new tokens, 16 at once, for the base, one adapter, 16 and 32 distinct ones."""

from __future__ import annotations

from dataclasses import asdict

from benchmarks.adapters import loras
from benchmarks.contest import HEAT, Contest, Turn
from benchmarks.load import W1
from benchmarks.scenarios.scenario import Bench, Reports, Scenario

DISTINCT = (16, 32)


def run(bench: Bench) -> Reports:
    load = bench.cut(W1)
    turns = {"base": Turn(load), "1 adapter": Turn(load, 1)}
    turns |= {f"{count} distinct": Turn(load, count) for count in map(bench.few, DISTINCT)}
    adapters = loras(bench.base, max(turn.adapters for turn in turns.values()))
    contest = Contest(bench.base, adapters, bench.room, bench.rounds, bench.cut(HEAT))
    for results in contest.run(bench.engines, turns):
        yield {"load": asdict(load), **results.as_json()}


SCENARIO = Scenario("w1", "distinct adapters beside every peer; base only beside vLLM and OpenVINO", run)
