"""llama.cpp's server, with files that its own converter and quantizer made. Adapters are asked for by number."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bases import Base, make_base
from benchmarks.engines.engine import EngineDidNotStart
from benchmarks.engines.over_http import Server, server
from benchmarks.engines.process import free_port
from benchmarks.install import LLAMA, folder, python, why_not
from benchmarks.load import Asked, Prompt

AT_ONCE = 16
CONTEXT = 512 * AT_ONCE  # shared out among the places of the batch
PLAIN = ("bf16", "f16")
CONVERTER = Path(__file__).parents[1] / "workers" / "gguf_convert.py"


@dataclass(frozen=True)
class Native:
    """Its own route, which takes token ids; every loaded adapter that is not named is off."""

    adapters: int
    path: str = "/completion"
    count: bytes = b'"tokens_predicted"'

    def body(self, prompt: Prompt, asked: Asked, new: int) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "n_predict": new,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
            "lora": [{"id": number, "scale": float(number == asked)} for number in range(self.adapters)],
        }

    def is_piece(self, event: bytes) -> bool:
        return b'"content":""' not in event and b'"stop":false' in event

    def tokens(self, event: dict[str, Any]) -> int:
        return int(event["tokens_predicted"])


@dataclass(frozen=True)
class Llama:
    """`weights`: bf16, f16, or a name that the quantizer knows, such as Q4_0."""

    weights: str
    adapters: bool = True

    @property
    def name(self) -> str:
        return f"llama-{self.weights}"

    @property
    def family(self) -> str:
        return "llama" if self.weights in PLAIN else self.name

    @contextmanager
    def start(self, base: Base, adapters: Sequence[Path], room: Path) -> Iterator[Server]:
        if why := why_not("llama"):
            raise EngineDidNotStart(why)
        port = free_port()
        threads = str(os.cpu_count() or 1)
        command: list[str | Path] = [_binary("llama-server"), "-m", base_gguf(base, self.weights), "--port", str(port)]
        command += ["-t", threads, "-tb", threads, "--parallel", str(AT_ONCE), "-c", str(CONTEXT), "-b", "2048"]
        command += ["-ub", "512", "--no-webui"]
        if adapters:
            command += ["--lora", ",".join(map(str, adapter_ggufs(base, adapters)))]
        with server(command, port, Native(len(adapters)), room / f"{self.name}.log", {}) as up:
            yield up


def base_gguf(base: Base, weights: str) -> Path:
    """Made now unless it is there. Raises: EngineDidNotStart."""
    made = base.folder.with_name(f"{base.name}-{weights}.gguf")
    if made.is_file():
        return made
    if weights in PLAIN:
        _convert("convert_hf_to_gguf.py", {made: ["--outtype", weights, str(make_base(base))]})
    else:
        _make([made], [_binary("llama-quantize"), base_gguf(base, PLAIN[0]), made, weights])
    return made


def adapter_ggufs(base: Base, adapters: Sequence[Path]) -> list[Path]:
    """Those that are not there are made in one go. Raises: EngineDidNotStart."""
    made = {adapter.with_suffix(".gguf"): adapter for adapter in adapters}
    missing = {one: adapter for one, adapter in made.items() if not one.is_file()}
    if missing:
        fixed = ["--outtype", "f16", "--base", str(make_base(base))]
        _convert("convert_lora_to_gguf.py", {one: [*fixed, str(adapter)] for one, adapter in missing.items()})
    return list(made)


def _convert(script: str, runs: Mapping[Path, Sequence[str]]) -> None:
    """`runs`: what is to be made, with the other arguments of that run."""
    asked = json.dumps([[*arguments, "--outfile", str(made)] for made, arguments in runs.items()])
    _make(list(runs), [python("llama"), CONVERTER, _sources(), script, asked])


def _make(made: Sequence[Path], command: Sequence[str | Path]) -> None:
    """Leaves none of them half done."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        for one in made:
            one.unlink(missing_ok=True)
        raise EngineDidNotStart(f"making {made[0].name} failed: {done.stderr[-1000:]}")


def _sources() -> Path:
    return folder("llama") / f"llama_cpp_python-{LLAMA}" / "vendor" / "llama.cpp"


def _binary(name: str) -> Path:
    return folder("llama") / "build" / "bin" / name
