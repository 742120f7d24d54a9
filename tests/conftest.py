"""For all tests: those that start processes come first, the longest of them before all.

Two workers share the files; one that begins last and takes minutes would leave the other with nothing to do.
Where there is no NVIDIA driver, Triton's kernels run in its interpreter: it must be chosen before Triton is imported.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

GPU = Path("/proc/driver/nvidia/version").exists()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

LONGEST = (
    "test_demo.py",
    "test_swap.py",
    "test_network.py",
    "test_train.py",
    "test_registry_hostile.py",
    "test_registry_crash.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_rank)
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA driver on this machine"))


def _rank(item: pytest.Item) -> tuple[int, int]:
    name = item.path.name
    return (
        LONGEST.index(name) if name in LONGEST else len(LONGEST),
        0 if item.path.parent.name in ("system", "chart") else 1,
    )
