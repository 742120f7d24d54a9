"""What the harness knows of an engine: how to start it with a base and adapters, and how to put a load on it.

`Engine` is a recipe, `Running` one that is up. An engine that cannot run here raises EngineDidNotStart with the reason
it gave, which stands in the results; one that cannot do what a load asks (mix adapters, say) raises CannotServe.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from benchmarks.bases import Base
from benchmarks.load import Asked, Load, Round


class EngineDidNotStart(Exception):
    """The message is what the engine itself said last."""


class CannotServe(Exception):
    """The engine has no way to do this; the message says what it lacks."""


class Running(Protocol):
    def load(self, load: Load, asked: Sequence[Asked], seed: int) -> Round:
        """Raises: LoadFailed, CannotServe."""

    def memory_bytes(self) -> int: ...

    def stop(self) -> None:
        """Keeps the memory and takes no time of the processor, until `go`."""

    def go(self) -> None: ...


class Engine(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def family(self) -> str:
        """Engines of one are the same program in other number formats; the best of them stands for it."""

    @property
    def adapters(self) -> bool:
        """Whether it is started to serve adapters."""

    def start(self, base: Base, adapters: Sequence[Path], room: Path) -> AbstractContextManager[Running]:
        """Raises: EngineDidNotStart."""
