"""What each kind of adapter costs beside our own bare base: 16 distinct ones of it in one batch, prefill and decode."""

from __future__ import annotations

from benchmarks.adapters import KINDS, other_kind
from benchmarks.contest import Contest, Turn
from benchmarks.scenarios.overhead import BUDGET_BYTES, phases
from benchmarks.scenarios.scenario import Bench, Reports, Scenario

COUNT = 16


def run(bench: Bench) -> Reports:
    count = bench.few(COUNT)
    adapters = [other_kind(bench.base, kind, number) for kind in KINDS for number in range(count)]
    turns = {}
    for phase, load in phases(count).items():
        turns[f"{phase}, base"] = Turn(bench.cut(load))
        for place, kind in enumerate(KINDS):
            turns[f"{phase}, {kind}"] = Turn(bench.cut(load), count, first=place * count)
    engines = [one.with_options({"adapter-bytes": BUDGET_BYTES}) for one in bench.ours]
    for results in Contest(bench.base, adapters, bench.room, bench.rounds).run(engines, turns):
        yield results.as_json()


SCENARIO = Scenario("kinds", "each kind against our own base only", run)
