"""What adapters cost beside our own bare base: prefill and decode apart, by number of adapters, rank and kind.

So many distinct adapters stand in one batch of 16 requests, or of 64 where there are 64; the base has the same batch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.adapters import MIXED_RANKS, loras, mixed_kinds, mixed_ranks
from benchmarks.bases import Base
from benchmarks.contest import Contest, Turn
from benchmarks.load import Load
from benchmarks.scenarios.scenario import Bench, Report, Reports, Scenario

COUNTS = (1, 4, 16, 64)
KINDS_COUNT = 16
PROMPT, NEW = 128, 64
SHORT_PROMPT = 8  # of what measures decoding
BUDGET_BYTES = 8 << 30  # 64 adapters of rank 64 take 4.5 GB

RANKS = {"rank 8": (8,), "rank 16": (16,), "rank 64": (64,), "ranks 8 to 64": MIXED_RANKS}  # in turn
GROUPS: dict[str, tuple[int, Callable[[Base, int], list[Path]]]] = {  # the largest count, and how they are made
    "rank 8": (64, lambda base, count: loras(base, count, 8)),  # what has a target comes first
    "mixed kinds": (KINDS_COUNT, mixed_kinds),
    "rank 16": (64, lambda base, count: loras(base, count, 16)),
    "rank 64": (64, lambda base, count: loras(base, count, 64)),
    "ranks 8 to 64": (64, mixed_ranks),
}


def run(bench: Bench) -> Reports:
    reports: Report = {}
    for group, (largest, make) in GROUPS.items():
        room = bench.room / group.replace(" ", "-")
        room.mkdir()
        counts = [count for count in COUNTS if count <= min(largest, bench.few(64))]
        contest = Contest(bench.base, make(bench.base, counts[-1]), room, bench.rounds)
        engines = [one.with_options({"adapter-bytes": BUDGET_BYTES}) for one in bench.ours]
        for results in contest.run(engines, turns(counts, bench)):
            reports[group] = results.as_json()
            yield {"groups": reports}


def turns(counts: list[int], bench: Bench) -> dict[str, Turn]:
    """Labels are "PHASE, COUNT of BATCH"; COUNT 0 is the base."""
    made = {}
    for batch in sorted({max(count, bench.few(16)) for count in counts}):
        for phase, load in phases(batch).items():
            for count in (0, *(one for one in counts if max(one, bench.few(16)) == batch)):
                made[f"{phase}, {count} of {batch}"] = Turn(bench.cut(load), count)
    return made


def phases(batch: int) -> dict[str, Load]:
    return {"prefill": Load(batch, PROMPT, 1, batch), "decode": Load(batch, SHORT_PROMPT, NEW, batch)}


SCENARIO = Scenario("overhead", "distinct adapters against our own base only", run)
