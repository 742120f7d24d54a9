"""What a scenario is given, and what it says about itself."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.bases import Base
from benchmarks.engines.engine import Engine
from benchmarks.engines.ours import Ours
from benchmarks.load import Load

Report = dict[str, Any]
Reports = Generator[Report, None, None]
SHORT = Load(requests=8, prompt=16, new=4, at_once=8)


@dataclass(frozen=True)
class Bench:
    """`engines`: those that were asked for. `short`: smaller counts, to see in minutes that all of it runs."""

    base: Base
    engines: Sequence[Engine]
    rounds: int
    room: Path
    short: bool

    def cut(self, load: Load) -> Load:
        """The load itself, or where it is to be short a token of it."""
        if not self.short:
            return load
        return replace(
            load,
            requests=min(load.requests, SHORT.requests),
            prompt=min(load.prompt, SHORT.prompt),
            new=min(load.new, SHORT.new),
            at_once=min(load.at_once, SHORT.at_once),
        )

    def few(self, count: int) -> int:
        return min(count, SHORT.at_once) if self.short else count

    @property
    def ours(self) -> list[Ours]:
        return [engine for engine in self.engines if isinstance(engine, Ours)]


@dataclass(frozen=True)
class Scenario:
    """`measures`: the target of docs/performance.md that it is for, in its words. `run` gives its report after every
    round, each time the whole of it, so that what is cut short keeps the rounds that were done."""

    name: str
    measures: str
    run: Callable[[Bench], Reports]
