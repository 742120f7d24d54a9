"""OpenVINO GenAI in process, without HTTP; the base as its own exporter writes it, 16-bit weights."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bases import Base, make_base
from benchmarks.engines.engine import EngineDidNotStart
from benchmarks.engines.in_process import Worker, worker
from benchmarks.install import folder, python, why_not


@dataclass(frozen=True)
class OpenVino:
    adapters: bool
    weights: str = "fp16"

    @property
    def name(self) -> str:
        return f"openvino-{self.weights}{'-lora' if self.adapters else ''}"

    @property
    def family(self) -> str:
        return f"openvino{'-lora' if self.adapters else ''}"

    @contextmanager
    def start(self, base: Base, adapters: Sequence[Path], room: Path) -> Iterator[Worker]:
        if why := why_not("openvino"):
            raise EngineDidNotStart(why)
        registered = [str(one) for one in adapters] if self.adapters else []
        options = {"model": str(exported(base, self.weights)), "adapters": registered}
        module = "benchmarks.workers.openvino_generate"
        with worker(python("openvino"), module, options, room / f"{self.name}.log") as up:
            yield up


def exported(base: Base, weights: str) -> Path:
    """The base in OpenVINO's format, made now unless it is there. Raises: EngineDidNotStart."""
    made = base.folder.with_name(f"{base.name}-openvino-{weights}")
    if not (made / "openvino_tokenizer.xml").is_file():
        command: list[str | Path] = [
            folder("openvino") / "venv" / "bin" / "optimum-cli",
            "export",
            "openvino",
            "--model",
            make_base(base),
        ]
        command += ["--task", "text-generation-with-past", "--weight-format", weights, made]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EngineDidNotStart(f"its exporter failed: {done.stderr[-1000:]}")
    return made
