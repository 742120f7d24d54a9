"""The engines that are up at a time: as many as the memory holds; for the next the one last used ends.

Rounds go through the engines in one order, so the one last used is the one that is wanted again the latest.
All but the one that works are stopped (SIGSTOP), so that none of their threads takes a core.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil

from benchmarks.bases import Base
from benchmarks.engines.engine import Engine, EngineDidNotStart, Running

FREE_BYTES = 6 << 30  # that an engine may need to start


@dataclass
class Stable:
    """`warm_up` is called with each engine that has just started. Leaving it ends them all."""

    base: Base
    adapters: Sequence[Path]
    room: Path
    warm_up: Callable[[Engine, Running], None]
    failed: dict[str, str] = field(default_factory=dict)  # by name: why an engine does not run here
    _up: dict[str, tuple[ExitStack, Running]] = field(default_factory=dict)  # the last used last

    def __enter__(self) -> Stable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._up:
            self._end_one()

    def lead_out(self, engine: Engine) -> Running | None:
        """Running, and to be led back; None where it does not run here."""
        if engine.name in self.failed:
            return None
        if engine.name not in self._up and not self._start(engine):
            return None
        stack, running = self._up.pop(engine.name)
        self._up[engine.name] = (stack, running)
        running.go()
        return running

    def lead_back(self, engine: Engine) -> None:
        self._up[engine.name][1].stop()

    def _start(self, engine: Engine) -> bool:
        while self._up and psutil.virtual_memory().available < FREE_BYTES:
            self._end_one()
        say(f"starting {engine.name}")
        stack = ExitStack()
        try:
            running = stack.enter_context(engine.start(self.base, self.adapters, self.room))
        except EngineDidNotStart as error:
            say(f"{engine.name} does not run here: {error}")
            self.failed[engine.name] = str(error)
            return False
        self._up[engine.name] = (stack, running)
        self.warm_up(engine, running)
        return True

    def _end_one(self) -> None:
        _, (stack, _) = self._up.popitem()
        stack.close()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201
