"""The targets: what was promised, the figure of the results, met or not. One function a row.

A ratio is of two figures of one run, made round by round; its spread, lowest to highest, stands beside the median.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Reports = Mapping[str, Mapping[str, Any]]
PEER_PROGRAMS = ("vllm", "llama", "peft", "openvino")


@dataclass(frozen=True)
class Figure:
    """`values`: one a round. `beside`: which peer it is measured against."""

    values: Sequence[float]
    beside: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        spread = f" ({min(self.values):.2f} to {max(self.values):.2f})" if len(self.values) > 1 else ""
        return f"{self.median:.2f}{spread}{self.beside and f', beside {self.beside}'}"


@dataclass(frozen=True)
class Target:
    """Met where the figure is at least (or at most) so much. `figure` is None where there is no result."""

    what: str
    words: str
    figure: Callable[[Reports], Figure | None]
    at_least: float | None = None
    at_most: float | None = None

    def row(self, reports: Reports) -> str:
        figure = self.figure(reports)
        if figure is None:
            return f"| {self.what} | {self.words} | not measured | |"
        return f"| {self.what} | {self.words} | {figure} | {'yes' if self.met(figure) else 'no'} |"

    def met(self, figure: Figure) -> bool:
        high = self.at_least is None or figure.median >= self.at_least
        return high and (self.at_most is None or figure.median <= self.at_most)


def targets_table(reports: Reports) -> str:
    lines = ["| what | target | measured | met |", "|---|---|---|---|"]
    return "\n".join([*lines, *(target.row(reports) for target in TARGETS)])


def rates(reports: Reports, scenario: str, engine: str, label: str) -> list[float]:
    rounds = reports.get(scenario, {}).get("rounds", {}).get(engine, {}).get(label, [])
    return [one["tokens_per_s"] for one in rounds]


def ratio(mine: Sequence[float], theirs: Sequence[float], beside: str = "") -> Figure | None:
    pairs = list(zip(mine, theirs, strict=False))
    return Figure([one / other for one, other in pairs], beside) if pairs else None


def beside_best(engine: str, scenario: str, label: str, *programs: str) -> Callable[[Reports], Figure | None]:
    """Of the peers that are these programs (or begin with these names), the one with the highest median."""

    def figure(reports: Reports) -> Figure | None:
        names = [name for name in reports.get(scenario, {}).get("rounds", {}) if name.startswith(programs)]
        found = {name: rates(reports, scenario, name, label) for name in names}
        found = {name: values for name, values in found.items() if values}
        if not found:
            return None
        best = max(found, key=lambda name: statistics.median(found[name]))
        return ratio(rates(reports, scenario, engine, label), found[best], best)

    return figure


def worse_of(*figures: Callable[[Reports], Figure | None]) -> Callable[[Reports], Figure | None]:
    def figure(reports: Reports) -> Figure | None:
        found = [one for one in (make(reports) for make in figures) if one is not None]
        return min(found, key=lambda one: one.median) if found else None

    return figure


def within(scenario: str, label: str, base: str) -> Callable[[Reports], Figure | None]:
    """Ours against ours."""
    return lambda reports: ratio(rates(reports, scenario, "ours", label), rates(reports, scenario, "ours", base))


def in_group(group: str, count: int, batch: int) -> Callable[[Reports], Figure | None]:
    """Throughput of the prompts and the new tokens together: the seconds of the two phases are added up."""

    def figure(reports: Reports) -> Figure | None:
        mine = reports.get("overhead", {}).get("groups", {}).get(group, {}).get("rounds", {}).get("ours", {})
        taken, bare = (_seconds(mine, f"{some} of {batch}") for some in (count, 0))
        return ratio(bare, taken)

    return figure


def _seconds(mine: Mapping[str, Sequence[Mapping[str, float]]], label: str) -> list[float]:
    """Of prefill and decode, round by round."""
    phases = [mine.get(f"{phase}, {label}", []) for phase in ("prefill", "decode")]
    return [sum(one["wall_s"] for one in pair) for pair in zip(*phases, strict=False)]


def of_engine(scenario: str, make: Callable[[Mapping[str, Any]], Figure | None]) -> Callable[[Reports], Figure | None]:
    def figure(reports: Reports) -> Figure | None:
        found = reports.get(scenario, {}).get("engines", {}).get("ours")
        return make(found) if found else None

    return figure


def cold_by(field: str) -> Callable[[Reports], Figure | None]:
    def make(found: Mapping[str, Any]) -> Figure | None:
        cold, warm = found["cold"][field], found["warm"][field]
        return Figure([cold / warm]) if cold and warm else None

    return of_engine("cold", make)


def resident(found: Mapping[str, Any]) -> Figure | None:
    loras = [one for name, one in found["adapters"].items() if name.startswith("lora r=8")]
    return Figure([max(one["resident_bytes"] / one["file_bytes"] for one in loras)])


W1_ADAPTERS = ("16 distinct", "32 distinct")
TARGETS = (
    Target(
        "16 and 32 distinct LoRA r=8, bf16",
        ">= 2.0 x the best peer with those adapters (moonshot 3)",
        worse_of(*(beside_best("ours", "w1", label, *PEER_PROGRAMS) for label in W1_ADAPTERS)),
        at_least=2.0,
    ),
    Target(
        "the same with the int8 base",
        ">= 3.0 x the best peer (moonshot 4)",
        worse_of(*(beside_best("ours-int8", "w1", label, *PEER_PROGRAMS) for label in W1_ADAPTERS)),
        at_least=3.0,
    ),
    Target("base only, bf16", ">= 1.2 x vLLM without LoRA", beside_best("ours", "w1", "base", "vllm"), at_least=1.2),
    Target("base only, bf16", ">= 1.0 x OpenVINO GenAI", beside_best("ours", "w1", "base", "openvino"), at_least=1.0),
    Target("16 distinct against our own base, r=8", ">= 0.85", in_group("rank 8", 16, 16), at_least=0.85),
    Target("64 distinct against our own base, r=8", ">= 0.75", in_group("rank 8", 64, 64), at_least=0.75),
    Target("mixed kinds against our own base", ">= 0.80", in_group("mixed kinds", 16, 16), at_least=0.80),
    Target(
        "single stream, one adapter, bf16",
        ">= 1.0 x the best 16-bit peer",
        beside_best("ours", "w2", "1 adapter", "vllm", "llama-bf16", "llama-f16", "peft", "openvino"),
        at_least=1.0,
    ),
    Target(
        "single stream, one adapter, int8",
        ">= 1.0 x llama.cpp Q4_0 with one adapter",
        beside_best("ours-int8", "w2", "1 adapter", "llama-Q4_0"),
        at_least=1.0,
    ),
    Target(
        "1,000 adapters, Zipf, budget of 64",
        ">= 0.8 x the throughput of one adapter",
        within("many", "zipf", "1 adapter"),
        at_least=0.8,
    ),
    Target("cold adapter, first token, p50", "<= 1.2 x a warm one", cold_by("first_token_p50_s"), at_most=1.2),
    Target("cold adapter, first token, p99", "<= 2 x a warm one", cold_by("first_token_p99_s"), at_most=2.0),
    Target("others' inter-token latency meanwhile, p99", "<= 1.1 x", cold_by("others_gap_p99_s"), at_most=1.1),
    Target(
        "rare adapter under a flood, first token, p99",
        "<= 3 x its figure alone",
        of_engine(
            "rare",
            lambda found: Figure([found["under the flood"]["first_token_p99_s"] / found["alone"]["first_token_p99_s"]]),
        ),
        at_most=3.0,
    ),
    Target(
        "1,000 idle requests, 10,000 adapters: the step",
        "<= 1.05 x without",
        of_engine("idle", lambda found: ratio(found["with"], found["without"])),
        at_most=1.05,
    ),
    Target("resident adapter", "<= 1.1 x its bytes in the file", of_engine("memory", resident), at_most=1.1),
)
