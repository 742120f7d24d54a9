"""A process of an engine, with all its children: started, waited for, stopped for a while, ended, weighed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from benchmarks.engines.engine import EngineDidNotStart

START_TIMEOUT_S = 600.0
END_TIMEOUT_S = 30.0
TOLD = 1500  # characters of the log that say why


class Process:
    """The process that was started and whatever it has started since."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def last_words(self) -> str:
        text = self._log.read_text(encoding="utf-8", errors="replace").strip()
        return text[-TOLD:]

    def memory_bytes(self) -> int:
        """Shared pages are split among those that share them."""
        return sum(one.memory_full_info().pss for one in self._all())

    def signal(self, number: signal.Signals) -> None:
        for one in self._all():
            with suppress(psutil.NoSuchProcess):
                one.send_signal(number)

    def end(self) -> None:
        """Kindly, then not."""
        everyone = self._all()
        self.signal(signal.SIGCONT)
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=END_TIMEOUT_S)
        for one in everyone:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        self._process.wait()

    def _all(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self._process.pid)
            return [parent, *parent.children(recursive=True)]
        return []


@contextmanager
def process(command: Sequence[str | Path], log: Path, environment: Mapping[str, str]) -> Iterator[Process]:
    with log.open("wb") as out:
        started = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(os.cpu_count() or 1), **environment},
            start_new_session=True,  # Ctrl-C is for us, who then end it ourselves
        )
    one = Process(started, log)
    try:
        yield one
    finally:
        one.end()


def wait_for(one: Process, ready: Callable[[], bool]) -> None:
    """Raises: EngineDidNotStart."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if not one.running:
            raise EngineDidNotStart(f"it ended: {one.last_words()}")
        if ready():
            return
        time.sleep(0.2)
    raise EngineDidNotStart(f"not ready within {START_TIMEOUT_S:g} s: {one.last_words()}")


def answers(url: str) -> bool:
    """Whether GET says 200."""
    try:
        return httpx.get(url, timeout=5).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
