"""For all tests: those that start processes come first, the longest of them before all.

Two workers share the files; one that begins last and takes minutes would leave the other with nothing to do.
"""

from __future__ import annotations

import pytest

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


def _rank(item: pytest.Item) -> tuple[int, int]:
    name = item.path.name
    return (
        LONGEST.index(name) if name in LONGEST else len(LONGEST),
        0 if item.path.parent.name in ("system", "chart") else 1,
    )
