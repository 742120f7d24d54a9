"""The real thing: a hub on disk, a server process on a free port, adapters that PEFT made for the embedded base."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

BASE = "seedling"
API_ENV = {"MULTIGRAFT_ADMIN_KEY": "admin-key-of-the-tests"}
ADMIN = {"Authorization": f"Bearer {API_ENV['MULTIGRAFT_ADMIN_KEY']}"}
START_TIMEOUT_S = 120
HUB = [sys.executable, "-c", "from hub.cli import main; main()"]


@dataclass
class Server:
    """A `hub serve` process and what it has logged."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str] = field(default_factory=list)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(timeout=60)


def environment(home: Path, **extra: str) -> dict[str, str]:
    """The test's own environment, with nothing of the user's hub in it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MULTIGRAFT_", "HUB_"))}
    return {**kept, "MULTIGRAFT_HOME": str(home), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", **extra}


def hub(home: Path, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command line as a person would."""
    done = subprocess.run(
        [*HUB, *map(str, arguments)], env=environment(home), capture_output=True, text=True, timeout=120, check=False
    )
    if check and done.returncode:
        raise AssertionError(f"hub {' '.join(map(str, arguments))} exited {done.returncode}: {done.stderr}")
    return done


@contextmanager
def serving(home: Path, *flags: str, base: str | Path = BASE, env: Mapping[str, str] = API_ENV) -> Iterator[Server]:
    """`hub serve` on a free port, stopped at the end."""
    process = subprocess.Popen(
        [*HUB, "serve", "--base", str(base), "--port", "0", "--threads", "1", *flags],
        env=environment(home, **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    server = Server(process, "")

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            server.lines.append(line)
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        while not server.url:
            line = lines.get(timeout=START_TIMEOUT_S)
            assert line is not None, f"the server ended: {''.join(server.lines)}"
            if line.startswith("Multigraft serves"):
                server.url = line.split()[-1]
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(timeout=60)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture(scope="session")
def random_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """(kind, seed) -> a folder that PEFT saved, with weights large enough to change every answer."""
    import torch
    from peft import (
        IA3Config,
        LoraConfig,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptTuningConfig,
        get_peft_model,
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hub.base import find_base

    tokenizer = AutoTokenizer.from_pretrained(find_base(BASE))
    made: dict[tuple[str, int], Path] = {}
    common: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    configs: dict[str, Callable[[], Any]] = {
        "lora": lambda: LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], **common),
        "ia3": lambda: IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **common
        ),
        "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=6, **common),
        "prompt": lambda: PromptTuningConfig(num_virtual_tokens=9, **common),
        "p-tuning": lambda: PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=32, **common),
    }

    def make(kind: str, seed: int) -> Path:
        if (kind, seed) not in made:
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_pretrained(find_base(BASE), dtype=torch.float32)
            model.name_or_path = model.config._name_or_path = BASE
            peft_model = get_peft_model(model, configs[kind]())
            for name, parameter in peft_model.named_parameters():
                if parameter.requires_grad:
                    parameter.data += (0.3 if "lora" in name else 1.0) * torch.randn_like(parameter)
            if kind == "prompt":  # noise would go unheard; the words that steer a latent skill do not
                skill = ("reverse", "shout", "echo", "double")[seed % 4]
                words = tokenizer(f"Mode: {skill}." + f" {skill}" * 9)["input_ids"][:9]
                table = peft_model.prompt_encoder.default.embedding.weight
                table.data = model.get_input_embeddings().weight[torch.tensor(words)].clone()
                assert len(table) == 9
            folder = tmp_path_factory.mktemp(f"{kind}-{seed}")
            peft_model.save_pretrained(folder)
            (folder / "README.md").unlink(missing_ok=True)
            made[kind, seed] = folder
        return made[kind, seed]

    return make
