"""What the page says of results: targets met or not, nothing invented where there is none, prose by hand left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bases import BASES
from benchmarks.floors import Machine, floor_s
from benchmarks.load import W1
from benchmarks.page import BEGIN, END, main
from benchmarks.tables import kinds
from benchmarks.targets import TARGETS, targets_table

HALF = BASES["half"]
MACHINE = Machine(bytes_per_s=20e9, operations_per_s=200e9)


def _rounds(*rates: float) -> list[dict[str, float]]:
    return [{"tokens_per_s": rate} for rate in rates]


def _w1(ours: float, vllm: float, llama: float) -> dict[str, Any]:
    labels = ("base", "16 distinct", "32 distinct")
    engines = {"ours": ours, "vllm-float32-lora": vllm, "llama-f16": llama}
    return {"rounds": {name: {label: _rounds(rate, rate) for label in labels} for name, rate in engines.items()}}


def test_no_target_is_met_or_missed_without_a_figure() -> None:
    lines = targets_table({}).splitlines()[2:]
    assert len(lines) == len(TARGETS)
    assert all("not measured" in line for line in lines)


@pytest.mark.parametrize(("ours", "met"), [(210, "yes"), (190, "no")])
def test_ours_is_set_beside_the_best_peer_of_the_load(ours: float, met: str) -> None:
    line = targets_table({"w1": _w1(ours, vllm=40, llama=100)}).splitlines()[2]
    assert "beside llama-f16" in line
    assert line.endswith(f"| {met} |")


def test_a_ratio_is_made_round_by_round() -> None:
    report = _w1(1, 1, 1)
    report["rounds"] = {"ours": {"base": _rounds(10, 40)}, "vllm-float32": {"base": _rounds(10, 20)}}
    line = next(line for line in targets_table({"w1": report}).splitlines() if "vLLM without" in line)
    assert "1.50 (1.00 to 2.00)" in line


def test_adapters_cost_what_they_add_to_prompts_and_new_tokens_together() -> None:
    seconds = {"prefill, 0 of 16": 1, "decode, 0 of 16": 3, "prefill, 16 of 16": 1.5, "decode, 16 of 16": 3.5}
    rounds = {label: [{"tokens_per_s": 0, "wall_s": wall}] for label, wall in seconds.items()}
    report = {"groups": {"rank 8": {"rounds": {"ours": rounds}}}}
    line = next(line for line in targets_table({"overhead": report}).splitlines() if "16 distinct against" in line)
    assert "| 0.80 | no |" in line


def test_a_kind_is_set_beside_the_base_of_its_phase() -> None:
    rates = {"prefill, base": 8, "prefill, lora": 6, "decode, base": 2, "decode, lora": 1}
    report = {"rounds": {"ours": {label: _rounds(rate, rate) for label, rate in rates.items()}}}
    assert kinds(report).splitlines()[2:] == ["| ours, lora | 0.75 (0.75 to 0.75) | 0.50 (0.50 to 0.50) |"]


def test_a_floor_grows_with_adapters_and_falls_with_the_machine() -> None:
    plain = floor_s(HALF, W1, MACHINE)
    assert plain < floor_s(HALF, W1, MACHINE, [8] * 16) < floor_s(HALF, W1, MACHINE, [64] * 16)
    assert floor_s(HALF, W1, Machine(40e9, 400e9)) == pytest.approx(plain / 2)


def test_the_page_keeps_what_was_written_by_hand(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{BEGIN}\nSTALE\n{END}\nafter\n", encoding="utf-8")
    (tmp_path / "half").mkdir()
    report = {
        "machine": {"commit": "0", "cpu": "c", "cores": 2, "load_before": 0.1, "python": "3", "versions": {}},
        "peers": {},
        "short": False,
        "floors": {"read_bytes_per_s": 1e10, "operations_per_s": {"fp32": 1e11}},
        "engines": {"ours": {"with": [2.0], "without": [2.0]}},
    }
    (tmp_path / "half" / "idle.json").write_text(json.dumps(report), encoding="utf-8")
    main(["--results", str(tmp_path), "--page", str(page)])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "STALE" not in text
    assert "| 1,000 idle requests, 10,000 adapters: the step | <= 1.05 x without | 1.00 | yes |" in text
