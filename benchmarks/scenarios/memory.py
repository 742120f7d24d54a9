"""Memory as used against the bytes it must have: base and adapters against their files, the KV cache."""

from __future__ import annotations

from pathlib import Path

import httpx

from benchmarks.adapters import KINDS, WEIGHTS, loras, other_kind
from benchmarks.engines.ours import ADMIN_KEY
from benchmarks.engines.over_http import Server
from benchmarks.scenarios.scenario import Bench, Report, Reports, Scenario

ADAPTERS = 16
KV_BYTES = 1 << 28


def run(bench: Bench) -> Reports:
    kinds = [other_kind(bench.base, kind, number) for number, kind in enumerate(KINDS)]
    labels = [*(f"lora r=8, {number}" for number in range(bench.few(ADAPTERS))), *KINDS]
    folders = [*loras(bench.base, bench.few(ADAPTERS)), *kinds]
    base_file = sum(file.stat().st_size for file in bench.base.folder.glob("*.safetensors"))
    report: Report = {"base_file_bytes": base_file, "kv_bytes": KV_BYTES, "engines": {}}
    for engine in bench.ours:
        room = bench.room / engine.name
        room.mkdir()
        with engine.with_options({"kv-bytes": KV_BYTES}).start(bench.base, folders, room) as up:
            report["engines"][engine.name] = weigh(up, labels, folders)
    yield report


def weigh(up: Server, labels: list[str], folders: list[Path]) -> Report:
    """`process_bytes`: after the start, and with every adapter resident."""
    before = up.memory_bytes()
    resident: Report = {}
    with httpx.Client(base_url=up.url, headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=120) as client:
        for number, (label, folder) in enumerate(zip(labels, folders, strict=True)):
            answer = client.post("/v1/adapters/warm", json={"ref": f"bench/a{number}"})
            file = (folder / WEIGHTS).stat().st_size
            status = answer.json()
            taken = status["bytes"] if answer.is_success else status["error"]["message"]
            resident[label] = {"file_bytes": file, "resident_bytes": taken}
    return {"process_bytes": {"start": before, "all resident": up.memory_bytes()}, "adapters": resident}


SCENARIO = Scenario("memory", "resident adapter against its bytes in the file; base, adapters and KV", run)
