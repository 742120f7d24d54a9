"""Engines beside each other on one machine, one at a time at work: heats, then interleaved rounds.

In a round every engine has all its turns once, ours and the peers' alike, with the same prompts, which are others in
every turn, since some keep what they have read. Ratios are made round by round, so that a slow minute of the machine
is in both sides. A turn that took more than SLOW_S is asked with one batch of requests from then on: as many at once,
for less long. What does not run is kept with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.bases import Base
from benchmarks.engines.engine import CannotServe, Engine, Running
from benchmarks.load import POPULARITY, Asked, Load, LoadFailed, Round
from benchmarks.stable import Stable, say

HEAT = Load(requests=16, prompt=32, new=8, at_once=16, timeout_s=180)  # some formats have no fast path: cut short
WARM_PROMPT, WARM_NEW = 16, 2
WARM_UP_SEED = 1_000_000
SLOW_S = 60.0


@dataclass(frozen=True)
class Turn:
    """What is asked for: of no adapter (the base), or of so many from `first` on, as popular as `popularity` says."""

    load: Load
    adapters: int = 0
    popularity: str = "distinct"
    first: int = 0

    def asked(self, seed: int) -> list[Asked]:
        if not self.adapters:
            return [None] * self.load.requests
        asked = POPULARITY[self.popularity](self.load.requests, self.adapters, seed)
        return [one if one is None else one + self.first for one in asked]

    def warming(self) -> Turn:
        """Short; every adapter once."""
        requests = max(self.adapters, min(self.load.requests, self.load.at_once))
        load = replace(self.load, requests=requests, prompt=WARM_PROMPT, new=min(self.load.new, WARM_NEW))
        return replace(self, load=load, popularity="distinct")

    def one_batch(self) -> Turn:
        return replace(self, load=replace(self.load, requests=min(self.load.requests, self.load.at_once)))


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
    heat: Load = HEAT

    def run(self, engines: Iterable[Engine], turns: Mapping[str, Turn]) -> Iterator[Results]:
        """Every turn of every engine that can do it: what there is after every round."""
        results = Results()

        def warm_up(engine: Engine, running: Running) -> None:
            for label, turn in _turns_of(engine, turns).items():
                self._load(engine, running, label, turn.warming(), WARM_UP_SEED, results)
            results.memory_bytes[engine.name] = running.memory_bytes()

        best = self._best_of_families(engines, results)
        with Stable(self.base, self.adapters, self.room, warm_up, results.failed) as stable:
            for number in range(self.rounds):
                for engine in best:
                    running = stable.lead_out(engine)
                    if running is None:
                        continue
                    for place, (label, turn) in enumerate(_turns_of(engine, turns).items()):
                        mine = results.rounds.setdefault(engine.name, {})
                        slow = label in mine and mine[label][0].wall_s > SLOW_S
                        asked = turn.one_batch() if slow else turn
                        done = self._load(engine, running, label, asked, number * len(turns) + place, results)
                        if done is not None:
                            mine.setdefault(label, []).append(done)
                            say(f"round {number}, {engine.name}, {label}: {done.tokens_per_s:.1f} tokens/s")
                    stable.lead_back(engine)
                yield results

    def _best_of_families(self, engines: Iterable[Engine], results: Results) -> list[Engine]:
        """Of engines that differ in number formats alone, the fastest here."""
        families: dict[str, list[Engine]] = {}
        for engine in engines:
            families.setdefault(engine.family, []).append(engine)
        for family in families.values():
            if len(family) > 1:
                for engine in family:
                    results.heats[engine.name] = self._heat(engine, results)
                family.sort(key=lambda engine: -results.heats[engine.name])
        return [family[0] for family in families.values()]

    def _heat(self, engine: Engine, results: Results) -> float:
        """Tokens per second; 0 where it does not run."""
        turn = Turn(self.heat, min(self.heat.requests, len(self.adapters)) if engine.adapters else 0)

        def warm_up(engine: Engine, running: Running) -> None:
            self._load(engine, running, "heat", replace(turn, load=replace(self.heat, new=1)), WARM_UP_SEED, results)

        with Stable(self.base, self.adapters, self.room, warm_up, results.failed) as stable:
            running = stable.lead_out(engine)
            done = running and self._load(engine, running, "heat", turn, WARM_UP_SEED + 1, results)
        rate = done.tokens_per_s if done else 0.0
        say(f"heat of {engine.name}: {rate:.1f} tokens/s")
        return rate

    def _load(
        self, engine: Engine, running: Running, label: str, turn: Turn, seed: int, results: Results
    ) -> Round | None:
        """None where this turn has failed, now or before."""
        name = f"{engine.name}, {label}"
        if name in results.failed:
            return None
        try:
            return running.load(turn.load, turn.asked(seed), seed)
        except (LoadFailed, CannotServe) as error:
            say(f"{name}: {error}")
            results.failed[name] = str(error)
            return None


def _turns_of(engine: Engine, turns: Mapping[str, Turn]) -> dict[str, Turn]:
    """An engine that was started without adapters gets the base's turns alone."""
    return {label: turn for label, turn in turns.items() if engine.adapters or not turn.adapters}
