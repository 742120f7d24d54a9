"""Engines up beside each other on one machine, one at a time at work: heats, then interleaved rounds.

In a round every turn comes once, ours and the peers' alike, with the same prompts; while one is at work the processes
of all others are stopped (SIGSTOP), so that none of their threads takes a core. Ratios are made round by round, so that
a slow minute of the machine is in both sides. What does not run is kept with its reason.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.bases import Base
from benchmarks.engines.engine import CannotServe, Engine, EngineDidNotStart, Running
from benchmarks.load import POPULARITY, Asked, Load, LoadFailed, Round

HEAT = Load(requests=16, prompt=32, new=8, at_once=16, timeout_s=180)  # some formats have no fast path: cut short
WARM_UP_SEED = 1_000_000


@dataclass(frozen=True)
class Turn:
    """What is asked for: of no adapter (the base), or of the first so many, as popular as `popularity` says."""

    load: Load
    adapters: int = 0
    popularity: str = "distinct"

    def asked(self, seed: int) -> list[Asked]:
        if not self.adapters:
            return [None] * self.load.requests
        return POPULARITY[self.popularity](self.load.requests, self.adapters, seed)


@dataclass
class Results:
    """`rounds` by engine and label; `failed`: why an engine, or a turn of it, has none."""

    rounds: dict[str, dict[str, list[Round]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    memory_bytes: dict[str, int] = field(default_factory=dict)
    heats: dict[str, float] = field(default_factory=dict)  # tokens per second

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Contest:
    base: Base
    adapters: Sequence[Path]
    room: Path
    rounds: int

    def run(self, engines: Iterable[Engine], turns: Mapping[str, Turn]) -> Results:
        """Every turn of every engine that can do it."""
        results = Results()
        with ExitStack() as stack:
            up: dict[str, Running] = {}
            mine: dict[str, dict[str, Turn]] = {}
            for engine in self._best_of_families(engines, results):
                started = self._start(stack, engine, results)
                if started is not None:
                    up[engine.name] = started
                    mine[engine.name] = _turns_of(engine, turns)
            for name, running in up.items():
                self._warm_up(name, running, mine[name], results)
            for number in range(self.rounds):
                for label in turns:
                    for name, running in up.items():
                        if label in mine[name]:
                            self._turn(name, running, label, turns[label], number, results)
        return results

    def _best_of_families(self, engines: Iterable[Engine], results: Results) -> list[Engine]:
        """Of engines that differ in number formats alone, the fastest here."""
        families: dict[str, list[Engine]] = {}
        for engine in engines:
            families.setdefault(engine.family, []).append(engine)
        best = []
        for family in families.values():
            if len(family) > 1:
                for engine in family:
                    results.heats[engine.name] = self._heat(engine, results)
                family.sort(key=lambda engine: -results.heats[engine.name])
            best.append(family[0])
        return best

    def _heat(self, engine: Engine, results: Results) -> float:
        """Tokens per second; 0 where it does not run."""
        turn = Turn(HEAT, min(HEAT.requests, len(self.adapters)) if engine.adapters else 0)
        with ExitStack() as stack:
            running = self._start(stack, engine, results)
            if running is None:
                return 0.0
            running.go()
            try:
                running.load(replace(HEAT, new=1), turn.asked(0), WARM_UP_SEED)
                rate = running.load(HEAT, turn.asked(0), WARM_UP_SEED + 1).tokens_per_s
            except (LoadFailed, CannotServe) as error:
                results.failed[engine.name] = str(error)
                return 0.0
        say(f"heat of {engine.name}: {rate:.0f} tokens/s")
        return rate

    def _start(self, stack: ExitStack, engine: Engine, results: Results) -> Running | None:
        """It is stopped again as soon as it is up."""
        say(f"starting {engine.name}")
        try:
            running = stack.enter_context(engine.start(self.base, self.adapters, self.room))
        except EngineDidNotStart as error:
            say(f"{engine.name} does not run here: {error}")
            results.failed[engine.name] = str(error)
            return None
        running.stop()
        return running

    def _warm_up(self, name: str, running: Running, turns: Mapping[str, Turn], results: Results) -> None:
        """Each turn once, short: adapters become resident, compilers and caches are done."""
        running.go()
        for label, turn in turns.items():
            requests = min(turn.load.requests, max(turn.adapters, turn.load.at_once))
            short = replace(turn, load=replace(turn.load, requests=requests, new=min(turn.load.new, 4)))
            try:
                running.load(short.load, short.asked(0), WARM_UP_SEED)
            except (LoadFailed, CannotServe) as error:
                results.failed[f"{name}, {label}"] = str(error)
        results.memory_bytes[name] = running.memory_bytes()
        running.stop()

    def _turn(self, name: str, running: Running, label: str, turn: Turn, number: int, results: Results) -> None:
        if f"{name}, {label}" in results.failed:
            return
        running.go()
        try:
            done = running.load(turn.load, turn.asked(number), number)
        except (LoadFailed, CannotServe) as error:
            results.failed[f"{name}, {label}"] = str(error)
            say(f"round {number}, {name}, {label}: {error}")
        else:
            results.rounds.setdefault(name, {}).setdefault(label, []).append(done)
            say(f"round {number}, {name}, {label}: {done.tokens_per_s:.1f} tokens/s")
        running.stop()


def _turns_of(engine: Engine, turns: Mapping[str, Turn]) -> dict[str, Turn]:
    """An engine that was started without adapters gets the base's turns alone."""
    return {label: turn for label, turn in turns.items() if engine.adapters or not turn.adapters}


def ratios(ours: Sequence[Round], theirs: Sequence[Round]) -> list[float]:
    """Round by round."""
    return [one.tokens_per_s / other.tokens_per_s for one, other in zip(ours, theirs, strict=False)]


def median_and_spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201
