"""An engine without HTTP, in a process of its own that is given whole loads (benchmarks/workers/lines.py)."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.engines.engine import EngineDidNotStart
from benchmarks.engines.process import START_TIMEOUT_S, Process
from benchmarks.load import Asked, Load, LoadFailed, Round, prompts

REPOSITORY = Path(__file__).parents[2]


class Worker:
    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._pipe = process
        self._late = False
        self._process = Process(process, log)

    def load(self, load: Load, asked: Sequence[Asked], seed: int) -> Round:
        words = {"prompts": prompts(load, seed), "adapters": list(asked), "new": load.new}
        answer = self._say(words, load.timeout_s)
        if "failed" in answer:
            raise LoadFailed(answer["failed"])
        if answer["tokens"] != load.requests * load.new:
            raise LoadFailed(f"asked for {load.requests * load.new} tokens, got {answer['tokens']}")
        return Round(tokens_per_s=answer["tokens"] / answer["wall_s"], wall_s=answer["wall_s"])

    def memory_bytes(self) -> int:
        return self._process.memory_bytes()

    def stop(self) -> None:
        self._process.signal(signal.SIGSTOP)

    def go(self) -> None:
        self._process.signal(signal.SIGCONT)

    def wait_until_ready(self) -> None:
        """Raises: EngineDidNotStart."""
        try:
            self._hear(START_TIMEOUT_S)
        except LoadFailed as error:
            raise EngineDidNotStart(str(error)) from error

    def end(self) -> None:
        self._process.end()

    def _say(self, words: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        if self._late:
            raise LoadFailed("it is still at an earlier load")
        assert self._pipe.stdin is not None
        self._pipe.stdin.write(json.dumps(words).encode() + b"\n")
        self._pipe.stdin.flush()
        return self._hear(timeout_s)

    def _hear(self, timeout_s: float) -> dict[str, Any]:
        assert self._pipe.stdout is not None
        if not select.select([self._pipe.stdout], [], [], timeout_s)[0]:
            self._late = True
            raise LoadFailed(f"not done within {timeout_s:g} s")
        line = self._pipe.stdout.readline()
        if not line:
            raise LoadFailed(f"it ended: {self._process.last_words()}")
        heard: dict[str, Any] = json.loads(line)
        return heard


@contextmanager
def worker(python: str | Path, module: str, options: Mapping[str, Any], log: Path) -> Iterator[Worker]:
    """Raises: EngineDidNotStart."""
    threads = str(os.cpu_count() or 1)
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [python, "-m", module, json.dumps({**options, "threads": int(threads)})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": threads},
            start_new_session=True,
        )
    one = Worker(process, log)
    try:
        one.wait_until_ready()
        yield one
    finally:
        one.end()
