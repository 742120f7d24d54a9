"""The page that says where others are wrong names tests, and they are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`(tests/[a-z0-9_/]+\.py)(?:::(\w+))?`")


def test_every_test_that_the_page_names_is_there() -> None:
    named = NAMED.findall((ROOT / "docs" / "correctness.md").read_text())
    assert len(named) > 20
    for file, test in named:
        source = (ROOT / file).read_text()
        assert not test or f"def {test}(" in source, f"{file} has no {test}"


def test_every_row_of_the_page_names_a_test() -> None:
    rows = [line for line in (ROOT / "docs" / "correctness.md").read_text().splitlines() if line.startswith("| ")]
    for row in rows:
        assert row.startswith("| what goes wrong") or NAMED.search(row), row
