"""The plots of docs/performance.md: throughput beside the peers, and what adapters cost beside our own base."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.tables import counts_of
from benchmarks.targets import rates

Reports = Mapping[str, Mapping[str, Any]]
SIZE_INCHES, DOTS_PER_INCH = (8, 4), 120


def plot(base: str, reports: Reports, page: Path) -> list[tuple[str, str]]:
    """Writes what the results have; (title, file beside the page) of each."""
    made = []
    docs = page.parent
    if "w1" in reports:
        made.append(("Output tokens per second, by adapters in the load", f"{page.stem}-{base}-peers.png"))
        _peers(reports["w1"], *made[-1], docs)
    if "overhead" in reports:
        made.append(("Decoding with distinct adapters, of our own base's rate", f"{page.stem}-{base}-overhead.png"))
        _overhead(reports["overhead"], *made[-1], docs)
    return made


def _peers(report: Mapping[str, Any], title: str, file: str, docs: Path) -> None:
    figure, axes = _axes(title)
    labels = list(dict.fromkeys(label for mine in report["rounds"].values() for label in mine))
    width = 0.8 / max(1, len(report["rounds"]))
    for place, (engine, mine) in enumerate(report["rounds"].items()):
        had = [number for number, label in enumerate(labels) if mine.get(label)]
        rounds = [[one["tokens_per_s"] for one in mine[labels[number]]] for number in had]
        middles = [statistics.median(one) for one in rounds]
        below = [middle - min(one) for middle, one in zip(middles, rounds, strict=True)]
        above = [max(one) - middle for middle, one in zip(middles, rounds, strict=True)]
        at = [number + place * width for number in had]
        axes.bar(at, middles, width, yerr=[below, above], label=engine, capsize=2)
    axes.set_xticks([number + 0.4 - width / 2 for number in range(len(labels))], labels)
    _save(figure, axes, docs / file)


def _overhead(report: Mapping[str, Any], title: str, file: str, docs: Path) -> None:
    figure, axes = _axes(title)
    for group, found in report["groups"].items():
        points = {}
        for count in counts_of(report):
            adapters, _, batch = count.split()
            mine = rates({"": found}, "", "ours", f"decode, {count}")
            of_base = rates({"": found}, "", "ours", f"decode, 0 of {batch}")
            if mine and of_base:
                points[adapters] = statistics.median(a / b for a, b in zip(mine, of_base, strict=False))
        axes.plot(list(points), list(points.values()), marker="o", label=group)
    axes.set_ylim(bottom=0)
    _save(figure, axes, docs / file)


def _axes(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # the extra `bench`: the tables need none of it

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def _save(figure: Any, axes: Any, file: Path) -> None:
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(file, dpi=DOTS_PER_INCH, metadata={"Software": None})
