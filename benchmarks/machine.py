"""Where and with what a result was measured: stands at the head of every result file."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = ":!benchmarks/results"  # left out


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """CPU, cores, load before the run, versions, the commit; a plus sign where more than results was changed since."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    cpu = next(
        (line.split(":")[1].strip() for line in cpuinfo.splitlines() if "model name" in line), platform.processor()
    )
    changed = _git("status", "--porcelain", "--", ".", RESULTS)
    return {
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if changed else ""),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
