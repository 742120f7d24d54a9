"""W2: one stream of 128 prompt and 128 new tokens, for the base and one adapter."""

from __future__ import annotations

from dataclasses import asdict

from benchmarks.adapters import loras
from benchmarks.contest import HEAT, Contest, Turn
from benchmarks.load import W2
from benchmarks.scenarios.scenario import Bench, Reports, Scenario


def run(bench: Bench) -> Reports:
    load = bench.cut(W2)
    contest = Contest(bench.base, loras(bench.base, 1), bench.room, bench.rounds, bench.cut(HEAT))
    for results in contest.run(bench.engines, {"base": Turn(load), "1 adapter": Turn(load, 1)}):
        yield {"load": asdict(load), **results.as_json()}


SCENARIO = Scenario("w2", "a single stream, one adapter", run)
