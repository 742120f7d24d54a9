"""vLLM's CPU build, started as its documentation says: threads bound to cores, allocator and OpenMP loaded first."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.adapters import rank_of
from benchmarks.bases import Base, make_base
from benchmarks.engines.engine import EngineDidNotStart
from benchmarks.engines.openai_dialect import OpenAI
from benchmarks.engines.over_http import Server, server
from benchmarks.engines.process import free_port
from benchmarks.install import folder, why_not

AT_ONCE = 16
LENGTH = 1024
KV_GIB = 1


@dataclass(frozen=True)
class Vllm:
    """`dtype`: of weights and activations. Started without adapters it has no LoRA support at all, and is faster."""

    dtype: str
    adapters: bool
    slots: int = AT_ONCE  # max_loras

    @property
    def name(self) -> str:
        return f"vllm-{self.dtype}{'-lora' if self.adapters else ''}"

    @property
    def family(self) -> str:
        return f"vllm{'-lora' if self.adapters else ''}"

    @contextmanager
    def start(self, base: Base, adapters: Sequence[Path], room: Path) -> Iterator[Server]:
        if why := why_not("vllm"):
            raise EngineDidNotStart(why)
        home = folder("vllm")
        port = free_port()
        names = [f"a{number}" for number in range(len(adapters))] if self.adapters else []
        command: list[str | Path] = [home / "venv" / "bin" / "vllm", "serve", make_base(base), "--port", str(port)]
        command += ["--served-model-name", base.name, "--dtype", self.dtype, "--max-num-seqs", str(AT_ONCE)]
        command += ["--max-model-len", str(LENGTH)]
        if self.adapters:
            rank = max(16, *map(rank_of, adapters))
            command += ["--enable-lora", "--max-loras", str(self.slots), "--max-lora-rank", str(rank)]
            command += ["--max-cpu-loras", str(max(self.slots, len(adapters))), "--lora-modules"]
            command += [f"{name}={place}" for name, place in zip(names, adapters, strict=True)]
        preloaded = [*home.glob("tcmalloc/**/libtcmalloc_minimal.so.4"), *home.glob("venv/lib/libiomp5.so")]
        cores = os.cpu_count() or 1
        environment = {
            "PATH": f"{home / 'venv' / 'bin'}:{os.environ['PATH']}",
            "LD_PRELOAD": ":".join(map(str, preloaded)),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
            "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
            "VLLM_NO_USAGE_STATS": "1",
        }
        with server(command, port, OpenAI(base.name, names), room / f"{self.name}.log", environment) as up:
            yield up
