"""Where and with what a result was measured: stands at the head of every result file."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """CPU, cores, load before the run, versions, and the commit (with a plus sign when files were changed since)."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    cpu = next(
        (line.split(":")[1].strip() for line in cpuinfo.splitlines() if "model name" in line), platform.processor()
    )
    return {
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain") else ""),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
