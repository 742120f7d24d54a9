"""The tables of docs/performance.md, from each scenario's results. A cell: the median (lowest to highest round)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.bases import Base
from benchmarks.floors import Machine, floor_s, machine_of
from benchmarks.load import Load
from benchmarks.scenarios.overhead import NEW, RANKS, SHORT_PROMPT
from benchmarks.targets import Figure, rates, ratio

Reports = Mapping[str, Mapping[str, Any]]
RANK = 8


def machine_lines(reports: Reports) -> list[str]:
    """What each scenario was measured on; those of one machine and commit stand together."""
    names: dict[str, list[str]] = {}
    for name, report in reports.items():
        names.setdefault(machine_line(report), []).append(name)
    rates = (f"* {name}: {floors_line(report)}" for name, report in reports.items())
    lines = [f"{', '.join(where)}: {line}" for line, where in names.items()]
    return [*lines, "The machine's best in each run:", "\n".join(rates)]


def machine_line(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in {**machine["versions"], **report["peers"]}.items())
    short = " Short counts, only to see that it runs." if report["short"] else ""
    return f"{machine['cores']} cores of {machine['cpu']}, commit {machine['commit']}; {versions}.{short}"


def floors_line(report: Mapping[str, Any]) -> str:
    floors = report["floors"]
    products = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in floors["operations_per_s"].items())
    return (
        f"{report['machine']['load_before']:.1f} load before; {floors['read_bytes_per_s'] / 1e9:.1f} GB/s read; "
        f"billion operations/s: {products}"
    )


def sections(base: Base, reports: Reports) -> list[str]:
    made: list[str] = []
    for name in ("w1", "w2"):
        if name in reports:
            load = Load(**reports[name]["load"])
            title = (
                f"{load.requests} requests of {load.prompt} prompt and {load.new} new tokens, {load.at_once} at once"
            )
            made += [f"#### {title}: output tokens/s", throughput(base, reports[name], load), latency(reports[name])]
            made += [failures(reports[name])] if reports[name]["failed"] else []
    if "overhead" in reports:
        made += [
            "#### Of our own base's throughput, by number of adapters in the batch",
            overhead(base, reports["overhead"]),
        ]
    if "kinds" in reports:
        made += ["#### Of our own base's throughput, 16 distinct adapters of one kind", kinds(reports["kinds"])]
    if "popularity" in reports:
        made += ["#### 64 adapters by popularity, of our own base's throughput", popularity(reports["popularity"])]
    if "memory" in reports:
        made += ["#### Memory", memory(reports["memory"])]
    return made


def cell(values: Sequence[float], digits: int = 0) -> str:
    if not values:
        return ""
    spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.{digits}f}{spread}"


def throughput(base: Base, report: Mapping[str, Any], load: Load) -> str:
    """The last row is the floor of 16-bit weights, which no way of computing it can pass."""
    labels = list(dict.fromkeys(label for mine in report["rounds"].values() for label in mine))
    lines = [f"| | {' | '.join(labels)} | memory, GB |", "|---" * (len(labels) + 2) + "|"]
    for engine, mine in report["rounds"].items():
        cells = [cell([one["tokens_per_s"] for one in mine.get(label, [])], 1) for label in labels]
        lines.append(f"| {engine} | {' | '.join(cells)} | {report['memory_bytes'].get(engine, 0) / 1e9:.1f} |")
    floors = [floor_tokens_per_s(base, report, load, label) for label in labels]
    lines.append(f"| floor | {' | '.join(f'{one:.0f}' for one in floors)} | {base.product_weights * 2 / 1e9:.1f} |")
    ours = [rates({"": report}, "", "ours", label) for label in labels]
    gaps = [
        f"{floor / statistics.median(mine):.1f} x" if mine else "" for floor, mine in zip(floors, ours, strict=True)
    ]
    lines.append(f"| ours to the floor | {' | '.join(gaps)} | |")
    return "\n".join(lines)


def floor_tokens_per_s(base: Base, report: Mapping[str, Any], load: Load, label: str) -> float:
    words = label.split()[0]
    distinct = min(int(words), load.at_once) if words.isdigit() else 0
    seconds = floor_s(base, load, machine_of(report["floors"]), [RANK] * distinct)
    return load.requests * load.new / seconds


def latency(report: Mapping[str, Any]) -> str:
    lines = ["| seconds | first token, mean | p50 | p99 | between tokens, p50 | p99 |", "|---|---|---|---|---|---|"]
    fields = ("first_token_mean_s", "first_token_p50_s", "first_token_p99_s", "gap_p50_s", "gap_p99_s")
    for engine, mine in report["rounds"].items():
        for label, rounds in mine.items():
            if rounds[0]["first_token_mean_s"] is not None:
                cells = [f"{statistics.median(one[field] for one in rounds):.3f}" for field in fields]
                lines.append(f"| {engine}, {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def failures(report: Mapping[str, Any]) -> str:
    """What did not run, in the engine's own words."""
    told = (f"* {name}: {' '.join(why.split())[-300:]}" for name, why in report["failed"].items())
    return "\n".join(["Did not run here:", "", *told])


def overhead(base: Base, report: Mapping[str, Any]) -> str:
    counts = counts_of(report)
    lines = [f"| | {' | '.join(counts)} |", "|---" * (len(counts) + 1) + "|"]
    for group, found in report["groups"].items():
        for engine in found["rounds"]:
            for phase in ("prefill", "decode"):
                cells = [str(_of_base(found, engine, phase, count) or "") for count in counts]
                lines.append(f"| {engine}, {group}, {phase} | {' | '.join(cells)} |")
        if group in RANKS:
            floors = [decode_floor_ratio(base, machine_of(report["floors"]), RANKS[group], count) for count in counts]
            lines.append(f"| {group}, decode at the floor | {' | '.join(f'{one:.2f}' for one in floors)} |")
    return "\n".join(lines)


def _of_base(found: Mapping[str, Any], engine: str, phase: str, count: str) -> Figure | None:
    base = rates({"": found}, "", engine, f"{phase}, 0 of {count.split()[-1]}")
    return ratio(rates({"": found}, "", engine, f"{phase}, {count}"), base)


def counts_of(report: Mapping[str, Any]) -> list[str]:
    """ "16 of 64": so many adapters in a batch of so many requests, the fewest first."""
    labels = (label for found in report["groups"].values() for mine in found["rounds"].values() for label in mine)
    counts = dict.fromkeys(label.partition(", ")[2] for label in labels)
    return sorted((count for count in counts if not count.startswith("0 ")), key=lambda count: int(count.split()[0]))


def decode_floor_ratio(base: Base, machine: Machine, ranks: Sequence[int], label: str) -> float:
    """What the adapters' own bytes and operations leave of the base's rate on a machine that does nothing else."""
    count, _, batch = label.split()
    load = Load(int(batch), SHORT_PROMPT, NEW, int(batch))
    distinct = [ranks[number % len(ranks)] for number in range(int(count))]
    return floor_s(base, load, machine) / floor_s(base, load, machine, distinct)


def kinds(report: Mapping[str, Any]) -> str:
    labels = [label.split(", ") for mine in report["rounds"].values() for label in mine]
    phases, names = (list(dict.fromkeys(one)) for one in zip(*labels, strict=True))
    lines = [f"| | {' | '.join(phases)} |", "|---" * (len(phases) + 1) + "|"]
    for engine in report["rounds"]:
        found = {phase: rates({"": report}, "", engine, f"{phase}, base") for phase in phases}
        for name in names:
            if name != "base":
                cells = [ratio(rates({"": report}, "", engine, f"{phase}, {name}"), found[phase]) for phase in phases]
                lines.append(f"| {engine}, {name} | {' | '.join(str(one or '') for one in cells)} |")
    return "\n".join(lines)


def popularity(report: Mapping[str, Any]) -> str:
    lines = ["| | output tokens/s | of the base |", "|---|---|---|"]
    for engine, mine in report["rounds"].items():
        base = rates({"": report}, "", engine, "base")
        for label in mine:
            rate = rates({"": report}, "", engine, label)
            lines.append(f"| {engine}, {label} | {cell(rate, 1)} | {ratio(rate, base) or ''} |")
    return "\n".join(lines)


def memory(report: Mapping[str, Any]) -> str:
    lines = [
        f"The base's file has {report['base_file_bytes'] / 1e6:.0f} MB, the KV cache {report['kv_bytes'] / 1e6:.0f} MB."
    ]
    for engine, found in report["engines"].items():
        sizes = ", ".join(f"{when} {size / 1e6:.0f} MB" for when, size in found["process_bytes"].items())
        lines += ["", f"Process of {engine}: {sizes}.", "", "| adapter | file, KB | resident, KB |", "|---|---|---|"]
        rows = {name.partition(", ")[0]: one for name, one in found["adapters"].items()}  # numbered ones are alike
        for name, one in rows.items():
            taken = one["resident_bytes"]
            shown = f"{taken / 1e3:.0f}" if isinstance(taken, int) else taken
            lines.append(f"| {name} | {one['file_bytes'] / 1e3:.0f} | {shown} |")
    return "\n".join(lines)
