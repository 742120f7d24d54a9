"""Adapters against our own bare base, and against PEFT in process, interleaved in one run on one machine.

    python -m benchmarks.serving [--rounds 3] [--out benchmarks/results]

The base has random weights (hidden 512, 8 layers, 8 query and 2 KV heads, vocabulary 32,000), the adapters are LoRA of
rank 8 on all seven Linears of a layer. A load is 32 requests of 128 random prompt tokens and 64 new tokens, 16 at a
time, greedy, without end token, streamed over HTTP on the loopback. Absolute figures belong to the machine; the ratios
are what the file is for. The client shares the cores with the server.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import peft
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.machine import machine
from benchmarks.report import SERVING, Counts, Report, command
from clients.local import serving
from hub.registry import LocalHub

VOCABULARY, PROMPT, NEW, REQUESTS, AT_ONCE, ADAPTERS, RANK = 32_000, 128, 64, 32, 16, 16, 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Round:
    """One load. Units: tokens per second over all requests, seconds to the first token."""

    tokens_per_s: float
    mean_first_token_s: float | None  # None: not measured, the answer comes whole


def make_base(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


def make_adapters(base: Path, room: Path) -> list[Path]:
    folders = []
    for number in range(ADAPTERS):
        torch.manual_seed(number)
        config = peft.LoraConfig(
            r=RANK, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        folders.append(room / f"adapter-{number}")
        model.save_pretrained(folders[-1])
        (folders[-1] / "README.md").unlink(missing_ok=True)
    return folders


def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCABULARY) for _ in range(PROMPT)] for _ in range(REQUESTS)]


async def load(url: str, names: list[str], seed: int) -> Round:
    """Request i asks for names[i % len(names)]."""
    places = asyncio.Semaphore(AT_ONCE)
    first: list[float] = []

    async def one(client: httpx.AsyncClient, name: str, prompt: list[int]) -> None:
        body = {"model": name, "prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        async with places:
            began = time.perf_counter()
            async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                answer.raise_for_status()
                heard = False
                async for line in answer.aiter_lines():
                    if not heard and '"text":"' in line:
                        heard = True
                        first.append(time.perf_counter() - began)

    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        began = time.perf_counter()
        work = (one(client, names[place % len(names)], prompt) for place, prompt in enumerate(prompts(seed)))
        await asyncio.gather(*work)
        took = time.perf_counter() - began
    return Round(REQUESTS * NEW / took, statistics.mean(first))


class Peft:
    """PEFT's own mixed batch: `generate` with one adapter name a row, in batches of 16."""

    def __init__(self, base: Path, folders: list[Path]) -> None:
        model = AutoModelForCausalLM.from_pretrained(base)
        self._model: Any = peft.PeftModel.from_pretrained(model, folders[0], adapter_name="a0").eval()
        for number, folder in enumerate(folders[1:], start=1):
            self._model.load_adapter(folder, adapter_name=f"a{number}")

    def load(self, names: list[str], seed: int) -> Round:
        asked = prompts(seed)
        began = time.perf_counter()
        for start in range(0, REQUESTS, AT_ONCE):
            batch = torch.tensor(asked[start : start + AT_ONCE])
            rows = [names[(start + row) % len(names)] for row in range(len(batch))]
            with torch.inference_mode():
                self._model.generate(
                    input_ids=batch,
                    attention_mask=torch.ones_like(batch),
                    max_new_tokens=NEW,
                    min_new_tokens=NEW,
                    do_sample=False,
                    adapter_names=rows,
                    pad_token_id=0,
                )
        return Round(REQUESTS * NEW / (time.perf_counter() - began), None)


def run(room: Path, counts: Counts) -> Report:
    base = room / "base"
    make_base(base)
    folders = make_adapters(base, room)
    os.environ["MULTIGRAFT_HOME"] = str(room / "home")
    hub = LocalHub(room / "home")
    names = [hub.push(folder, f"bench/{folder.name}", base=base).name for folder in folders]
    theirs = Peft(base, folders)
    results: dict[str, list[Round]] = {}
    with serving(str(base), room / "server.log") as url:
        fused = [f"{one}*0.5+{other}*0.5" for one, other in zip(names, names[1:] + names[:1], strict=True)]
        loads = {"base": [base.name], "1 adapter": names[:1], "16 adapters": names, "16 fusions of two": fused}
        asyncio.run(load(url, [base.name, *names], 999))  # everything resident and warm
        for number in range(counts["rounds"]):
            for label, models_ in loads.items():
                results.setdefault(label, []).append(asyncio.run(load(url, models_, number)))
            rows = [f"a{place}" for place in range(ADAPTERS)]
            results.setdefault("PEFT, base", []).append(theirs.load(["__base__"], number))
            results.setdefault("PEFT, 16 adapters", []).append(theirs.load(rows, number))
    return {
        "machine": machine(SERVING),
        "rounds": {label: [asdict(one) for one in all_] for label, all_ in results.items()},
    }


def table(report: Report) -> str:
    rates = {label: [one["tokens_per_s"] for one in rounds] for label, rounds in report["rounds"].items()}
    lines = ["| load | output tokens/s, median (min to max) | ratio to our base |", "|---|---|---|"]
    for label, all_ in rates.items():
        ratio = statistics.median(one / base for one, base in zip(all_, rates["base"], strict=True))
        lines.append(f"| {label} | {statistics.median(all_):.0f} ({min(all_):.0f} to {max(all_):.0f}) | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    command("serving", __doc__, {"rounds": 3}, run, table)


if __name__ == "__main__":
    main()
