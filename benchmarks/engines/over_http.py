"""An engine that is a server on the loopback: its process, and the client that speaks its dialect."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.engines.process import Process, answers, process, wait_for
from benchmarks.load import Asked, Client, Dialect, Load, Round, measure


class Server:
    def __init__(self, url: str, dialect: Dialect, process: Process) -> None:
        self.url = url
        self.dialect = dialect
        self._process = process

    def load(self, load: Load, asked: Sequence[Asked], seed: int) -> Round:
        return measure(Client(self.url, self.dialect), load, asked, seed)

    def memory_bytes(self) -> int:
        return self._process.memory_bytes()

    def stop(self) -> None:
        self._process.signal(signal.SIGSTOP)

    def go(self) -> None:
        self._process.signal(signal.SIGCONT)


@contextmanager
def server(
    command: Sequence[str | Path], port: int, dialect: Dialect, log: Path, environment: Mapping[str, str]
) -> Iterator[Server]:
    """Raises: EngineDidNotStart."""
    url = f"http://127.0.0.1:{port}"
    with process(command, log, environment) as one:
        wait_for(one, lambda: answers(f"{url}/health"))
        yield Server(url, dialect, one)
