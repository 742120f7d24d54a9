"""A `hub serve` process of one's own: started, waited for, stopped. Known by its command line and its HTTP alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from clients.errors import ServerDidNotStart

START_TIMEOUT_S: Final = 180
STOP_TIMEOUT_S: Final = 30
ANNOUNCED: Final = "Multigraft serves"
COMMAND: Final = [sys.executable, "-m", "hub.cli"]


@contextmanager
def serving(base: str, log: Path, *, port: int = 0) -> Iterator[str]:
    """The URL of a server on this machine that writes to `log`. Raises: ServerDidNotStart."""
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [*COMMAND, "serve", "--base", base, "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C is for the parent, which then stops the server itself
        )
        try:
            yield _wait_for_url(process, log)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for_url(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        lines = log.read_text(encoding="utf-8").splitlines()
        for line in lines:
            if line.startswith(ANNOUNCED):
                return line.split()[-1]
        if process.poll() is not None:
            raise ServerDidNotStart(f"hub serve ended with code {process.returncode}: {' '.join(lines[-1:])}")
        time.sleep(0.1)
    raise ServerDidNotStart(f"hub serve did not start within {START_TIMEOUT_S} s")
