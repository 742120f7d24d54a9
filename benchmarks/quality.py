"""What a base loses when its weights are held in few bits: KL divergence of the next token's distribution from that of
the whole base, how often both agree on the likeliest token, and the memory that the weights take.

    python -m benchmarks.quality --prompts 12

On seedling, with prompts of its recipe that it was not trained on, and on a random base, with random tokens: there the
distributions are nearly flat, and a small change turns the likeliest token over. Every position of a prompt counts.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.machine import machine
from benchmarks.report import SERVING, Counts, Report, command
from hub.base import find_base
from server.config import ModelConfig
from server.model.load import load_network
from server.model.network import Batch, Network, span_plan
from trainer.seedling.evaluate import EVAL_SEED
from trainer.seedling.steering import steering
from trainer.seedling.text import SKILLS
from trainer.tasks import TASKS

METHODS = ("none", "int8", "nf4", "fp8")
RANDOM: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "initializer_range": 0.05,
}
RANDOM_TOKENS = 48


def main() -> None:
    command("quality", __doc__, {"prompts": 12}, run, table)


def run(room: Path, counts: Counts) -> Report:
    report: Report = {"machine": machine((*SERVING, "bitsandbytes")), "counts": dict(counts), "bases": {}}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**RANDOM)).save_pretrained(room / "random")
    seedling = find_base("seedling")
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.randint(3, RANDOM["vocab_size"], (RANDOM_TOKENS,), generator=generator)
        for _ in range(counts["prompts"] * len(SKILLS))
    ]
    bases = {"seedling": (seedling, held_out(seedling, counts["prompts"])), "random": (room / "random", made)}
    for name, (folder, prompts) in bases.items():
        report["bases"][name] = measure(folder, name, prompts)
    return report


def held_out(folder: Path, each: int) -> list[Tensor]:
    """Steered questions with their answers, of every skill, from the split that is kept for evaluation."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rng = random.Random(EVAL_SEED)
    chats = [
        [{"role": "system", "content": steering(rng, skill)}, *row["messages"]]
        for skill in SKILLS
        for row in TASKS[skill].rows("eval", each, EVAL_SEED)
    ]
    return [torch.tensor(tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]) for chat in chats]


def measure(folder: Path, name: str, prompts: Sequence[Tensor]) -> Report:
    whole: list[Tensor] = []
    figures: Report = {"positions": sum(map(len, prompts)), "methods": {}}
    for method in METHODS:
        network = load_network(ModelConfig(base=name, dtype="float32", quantize=method), folder, name=name)
        own = [log_probabilities(network, ids) for ids in prompts]
        whole = whole or own
        figures["methods"][method] = {**distances(whole, own), "weight_bytes": network.facts.weight_bytes}
    return figures


def log_probabilities(network: Network, ids_T: Tensor) -> Tensor:
    cache = network.new_cache(1, len(ids_T))
    every = torch.arange(len(ids_T))
    plan = span_plan(cache, [(len(ids_T), len(ids_T), [0])])
    return network.forward(Batch(ids_T, every, plan, every, None, {})).double().log_softmax(-1)


def distances(whole: Sequence[Tensor], own: Sequence[Tensor]) -> Mapping[str, float]:
    p_TV, q_TV = torch.cat(list(whole)), torch.cat(list(own))
    divergence_T = (p_TV.exp() * (p_TV - q_TV)).sum(-1).clamp(min=0)
    return {
        "kl_mean": float(divergence_T.mean()),
        "kl_p99": float(divergence_T.quantile(0.99)),
        "top1_agreement": float((p_TV.argmax(-1) == q_TV.argmax(-1)).double().mean()),
    }


def table(report: Report) -> str:
    lines = ["| base | weights | KL mean | KL p99 | same likeliest token | MiB |", "|---|---|---|---|---|---|"]
    for base, figures in report["bases"].items():
        for method, one in figures["methods"].items():
            lines.append(
                f"| {base} | {method} | {one['kl_mean']:.1e} | {one['kl_p99']:.1e} | {one['top1_agreement']:.3f} | "
                f"{one['weight_bytes'] / 2**20:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
