"""What a scenario is given, and what it says about itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bases import Base
from benchmarks.engines.engine import Engine
from benchmarks.engines.ours import Ours

Report = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """`engines`: those that were asked for. `short`: smaller counts, to see in minutes that all of it runs."""

    base: Base
    engines: Sequence[Engine]
    rounds: int
    room: Path
    short: bool

    @property
    def ours(self) -> list[Ours]:
        return [engine for engine in self.engines if isinstance(engine, Ours)]


@dataclass(frozen=True)
class Scenario:
    """`measures`: the target of docs/performance.md that it is for, in its words."""

    name: str
    measures: str
    run: Callable[[Bench], Report]
