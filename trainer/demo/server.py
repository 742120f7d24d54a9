"""A `hub serve` process of the demo's own: started, waited for, stopped. trainer/ knows the server by HTTP only."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from trainer.errors import DemoFailed

START_TIMEOUT_S: Final = 120
ANNOUNCED: Final = "Multigraft serves"


@contextmanager
def serving(base: str, log: Path, *, port: int = 0) -> Iterator[str]:
    """The URL of a server on this machine; its log goes to a file. Raises DemoFailed if it does not start."""
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "hub.cli", "serve", "--base", base, "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C is for the demo, which then stops the server itself
        )
        try:
            yield wait_for_url(process, log)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_for_url(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        said = log.read_text(encoding="utf-8")
        for line in said.splitlines():
            if line.startswith(ANNOUNCED):
                return line.split()[-1]
        if process.poll() is not None:
            raise DemoFailed(f"the server ended with code {process.returncode}: {said.strip().splitlines()[-1:]}")
        time.sleep(0.1)
    raise DemoFailed(f"the server did not start within {START_TIMEOUT_S} s; its log is {log}")
