"""How well a trained router finds the right adapter, against always choosing it, on prompts that nobody labels.

    python -m benchmarks.routing [--out benchmarks/results]

Four skills are trained on `seedling` as LoRA, each on the words of its own topic; then `hub train --method lora-moe`
trains a router over them on a mixture of the four kinds of prompts, which it is not told apart. All are asked over
HTTP, greedily, about phrases that no training saw: by the right adapter, by the router, by arrow, by the bare base. An
answer is right when it is the wanted text.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import machine
from clients.local import serving
from hub.base import find_base
from hub.registry import LocalHub
from trainer.recipe import parse_recipe
from trainer.tasks import ANIMALS, FOODS, NATURE, TASKS, THINGS, Phrase, Row, Split, exchange, split_of, write_jsonl
from trainer.train import Workshop, train

SKILLS: dict[str, Phrase] = {"reverse": ANIMALS, "pirate": FOODS, "double": NATURE, "rotate": THINGS}
# Not the first layer: what it reads of a token is the token alone, so there a router cannot tell whose answer goes on.
LAYERS = (1, 2, 3)
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")  # fmt: skip
EXPERT_STEPS, EXPERT_RATE = 150, 4e-3
ROUTER_STEPS, ROUTER_RATE, IMITATION_STEPS = 220, 5e-2, 80
PROMPTS, AT_ONCE, NEW = 50, 16, 48
SHARED = {"base": "seedling", "batch_size": 16, "schedule": "cosine", "warmup_steps": 10, "seed": 1}
PACKAGES = ("multigraft", "torch", "transformers", "peft")


def rows(skill: str, split: Split, count: int) -> list[Row]:
    """Distinct phrases of the skill's topic with its answers."""
    rng = random.Random(f"{skill}/{split}")
    drawn: dict[Phrase, None] = {}
    while len(drawn) < count:
        phrase = tuple(rng.sample(SKILLS[skill], rng.randint(3, 5)))
        if split_of(phrase) == split:
            drawn[phrase] = None
    return [exchange(phrase, TASKS[skill].answer(phrase)) for phrase in drawn]


def teach(room: Path, hub: LocalHub) -> None:
    """The four skills, then the router over them, each trained and pushed."""
    for skill in SKILLS:
        write_jsonl(rows(skill, "train", 1500), room / f"{skill}.jsonl")
        recipe = {"method": "lora", "steps": EXPERT_STEPS, "learning_rate": EXPERT_RATE}
        options = {"rank": 8, "targets": [f"layers.{layer}.{module}" for layer in LAYERS for module in MODULES]}
        learn(room, hub, skill, {**recipe, "data": str(room / f"{skill}.jsonl"), "options": options})
    mixed = [row for skill in SKILLS for row in rows(skill, "train", 1500)]
    random.Random(0).shuffle(mixed)
    write_jsonl(mixed, room / "mixed.jsonl")
    recipe = {"method": "lora-moe", "steps": ROUTER_STEPS, "learning_rate": ROUTER_RATE}
    options = {"experts": list(SKILLS), "imitation_steps": IMITATION_STEPS}
    learn(room, hub, "router", {**recipe, "data": str(room / "mixed.jsonl"), "options": options})


def learn(room: Path, hub: LocalHub, name: str, fields: dict[str, Any]) -> None:
    recipe = parse_recipe({**SHARED, "eval_rows": 32, **fields}, name)
    result = train(recipe, room / name, workshop=Workshop(threads=1))
    print(f"{name}: {result.train_s:.0f} s, {result.metrics['eval_exact_match']:.2f} held out", flush=True)  # noqa: T201
    hub.push(room / name, name, base=find_base("seedling"))


async def ask(url: str, choose: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The share of right answers by skill; `choose` are the fields that choose the adapters for each."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(client: httpx.AsyncClient, skill: str, row: Row) -> bool:
        question, answer = row["messages"]
        body = {"messages": [question], "max_tokens": NEW, "temperature": 0, **choose[skill]}
        async with places:
            response = await client.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        return bool(response.json()["choices"][0]["message"]["content"] == answer["content"])

    shares = {}
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        for skill in SKILLS:
            right = await asyncio.gather(*(one(client, skill, row) for row in rows(skill, "eval", PROMPTS)))
            shares[skill] = sum(right) / len(right)
    return shares


def run(room: Path) -> dict[str, Any]:
    os.environ["MULTIGRAFT_HOME"] = str(room / "home")
    head = machine(PACKAGES)
    teach(room, LocalHub(room / "home"))
    arrow = {"routing": {"mode": "arrow", "candidates": list(SKILLS)}}
    ways: dict[str, dict[str, dict[str, Any]]] = {
        "the right adapter": {skill: {"model": skill} for skill in SKILLS},
        "gate": {skill: {"model": "router"} for skill in SKILLS},
        "arrow": dict.fromkeys(SKILLS, arrow),
        "the bare base": {skill: {} for skill in SKILLS},
    }
    with serving("seedling", room / "server.log") as url:
        shares = {way: asyncio.run(ask(url, choose)) for way, choose in ways.items()}
    means = {way: sum(by_skill.values()) / len(by_skill) for way, by_skill in shares.items()}
    ratios = {way: mean / means["the right adapter"] for way, mean in means.items()}
    return {"machine": head, "prompts_of_each": PROMPTS, "right": shares, "mean": means, "ratio": ratios}


def table(report: dict[str, Any]) -> str:
    lines = [f"| chosen by | {' | '.join(SKILLS)} | mean | of the right adapter's |", "|---" * (len(SKILLS) + 3) + "|"]
    for way, by_skill in report["right"].items():
        cells = " | ".join(f"{share:.2f}" for share in by_skill.values())
        lines.append(f"| {way} | {cells} | {report['mean'][way]:.3f} | {report['ratio'][way]:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="multigraft-bench-") as room:
        report = run(Path(room))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "routing.json").write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))  # noqa: T201


if __name__ == "__main__":
    main()
