"""The tables and plots of docs/performance.md, made from benchmarks/results: `python -m benchmarks.page`.

Those of another machine: --results and --page.

All between the two lines `made by benchmarks.page` is made; around them is prose by hand. What has no result yet
says so. Plots need matplotlib (the extra `bench`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bases import BASES
from benchmarks.plots import plot
from benchmarks.tables import machine_lines, sections
from benchmarks.targets import targets_table

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- made by benchmarks.page: begin -->", "<!-- made by benchmarks.page: end -->"

Reports = dict[str, dict[str, Any]]


def read(base: str, results: Path) -> Reports:
    """By scenario."""
    return {one.stem: json.loads(one.read_text(encoding="utf-8")) for one in sorted((results / base).glob("*.json"))}


def made_page(results: Path, page: Path) -> str:
    """What stands between the two lines of `page`; its plots are written beside it. Targets are judged for each base
    that has results; they were set for `half`."""
    parts: list[str] = []
    for base in BASES:
        reports = read(base, results)
        if not reports:
            continue
        parts += [f"### Base `{base}`", *machine_lines(reports)]
        parts += [targets_table(reports), *sections(BASES[base], reports)]
        parts += [f"![{title}]({file})" for title, file in plot(base, reports, page)]
    return "\n\n".join(parts) or "No results yet: run `make bench`."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=DOCS / "performance.md")
    asked = parser.parse_args(arguments)
    text = asked.page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    made = made_page(asked.results, asked.page)
    asked.page.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
