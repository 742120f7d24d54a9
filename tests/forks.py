"""Processes for tests that need many: forked from one that has imported everything already, so they start at once.

There is one such server of forks for a whole run of tests, and what it imports is said here, once, for all of them.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hub.cli import main

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    [
        "hub.http.serve",
        "hub.tables",
        "hub.validate",
        "tests.system.test_hub_crash",
        "tests.system.test_registry_crash",
    ]
)

COMMAND_S = 120.0


def start(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    process = processes.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def hub_command(
    arguments: list[str], environment: Mapping[str, str], *, notes: Path
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own; `notes` is where what it says may be put down."""
    out, err = notes.with_suffix(".out"), notes.with_suffix(".err")
    process = start(_command, arguments, dict(environment), out, err)
    process.join(COMMAND_S)
    assert process.exitcode is not None, f"hub {' '.join(arguments)} does not end"
    return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), err.read_text())


def _command(arguments: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.argv = ["hub", *arguments]
    main()
