"""PEFT in our own environment, in process, without HTTP: what it takes to mix adapters with the library itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bases import Base, make_base
from benchmarks.engines.in_process import Worker, worker


@dataclass(frozen=True)
class Peft:
    dtype: str
    family: str = "peft"
    adapters: bool = True

    @property
    def name(self) -> str:
        return f"peft-{self.dtype}"

    @contextmanager
    def start(self, base: Base, adapters: Sequence[Path], room: Path) -> Iterator[Worker]:
        options = {"base": str(make_base(base)), "adapters": [str(one) for one in adapters], "dtype": self.dtype}
        with worker(sys.executable, "benchmarks.workers.peft_generate", options, room / f"{self.name}.log") as up:
            yield up
