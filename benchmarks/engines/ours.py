"""Multigraft: `hub serve` over a hub of its own that holds the adapters as bench/a0, bench/a1, ..."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.bases import Base, make_base
from benchmarks.engines.openai_dialect import OpenAI
from benchmarks.engines.over_http import Server, server
from benchmarks.engines.process import free_port
from hub.registry import LocalHub

ADMIN_KEY = "bench"


@dataclass(frozen=True)
class Ours:
    """`options` are those of `hub serve`, without dashes."""

    name: str = "ours"
    family: str = "ours"
    adapters: bool = True
    options: Mapping[str, str | int] = field(default_factory=dict)

    def with_options(self, options: Mapping[str, str | int]) -> Ours:
        return replace(self, options={**self.options, **options})

    @contextmanager
    def start(self, base: Base, adapters: Sequence[Path], room: Path) -> Iterator[Server]:
        names = fill_hub(room / "home", base, adapters)
        with self.serve(base, names, room) as up:
            yield up

    @contextmanager
    def serve(self, base: Base, names: Sequence[str], room: Path) -> Iterator[Server]:
        """Over the hub in the room as it is. Raises: EngineDidNotStart."""
        port = free_port()
        options = [part for name, value in self.options.items() for part in (f"--{name}", str(value))]
        command: list[str | Path] = [
            sys.executable,
            "-m",
            "hub.cli",
            "serve",
            "--base",
            make_base(base),
            "--port",
            str(port),
            *options,
        ]
        environment = {"MULTIGRAFT_HOME": str(room / "home"), "MULTIGRAFT_ADMIN_KEY": ADMIN_KEY}
        with server(command, port, OpenAI(base.name, names), room / f"{self.name}.log", environment) as up:
            yield up


def fill_hub(home: Path, base: Base, adapters: Sequence[Path]) -> list[str]:
    """The names that they have there."""
    hub = LocalHub(home)
    return [hub.push(folder, f"bench/a{number}", base=make_base(base)).name for number, folder in enumerate(adapters)]
