"""W1: 32 requests of 128 prompt and 64 new tokens, 16 at once, for the base, one adapter, 16 and 32 distinct ones."""

from __future__ import annotations

from benchmarks.adapters import loras
from benchmarks.contest import Contest, Turn
from benchmarks.load import W1
from benchmarks.scenarios.scenario import Bench, Report, Scenario

TURNS = {
    "base": Turn(W1),
    "1 adapter": Turn(W1, 1),
    "16 distinct": Turn(W1, 16),
    "32 distinct": Turn(W1, 32),
}


def run(bench: Bench) -> Report:
    contest = Contest(bench.base, loras(bench.base, 32), bench.room, bench.rounds)
    return contest.run(bench.engines, TURNS).as_json()


SCENARIO = Scenario("w1", "distinct adapters beside every peer; base only beside vLLM and OpenVINO", run)
