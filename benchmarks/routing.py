"""How well a trained router finds the right adapter, against always choosing it, on prompts that nobody labels.

    python -m benchmarks.routing [--out benchmarks/results]

Two sets of four skills are trained on `seedling` as LoRA: in `subjects` each is for bare phrases of its own subject, in
`wishes` a phrase of any words stands before or after the user's wish. Then `hub train --method lora-moe` trains a
router over each set, with every option as it is by default, on a mixture of its four kinds of prompts, which it is not
told apart. All are asked over HTTP, greedily, about phrases that no training saw: by the right adapter, by the router,
by arrow, by the bare base. An answer is right when it is the wanted text.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import machine
from benchmarks.phrases import distinct_phrases
from benchmarks.report import SERVING, Counts, Report, command
from clients.local import serving
from hub.base import find_base
from hub.registry import LocalHub
from trainer.recipe import parse_recipe
from trainer.tasks import (
    ANIMALS,
    FOODS,
    NATURE,
    TASKS,
    THINGS,
    WORDS,
    Message,
    Phrase,
    Row,
    Split,
    write_jsonl,
)
from trainer.train import Workshop, train


@dataclass(frozen=True)
class Skill:
    """A task, the words of its phrases, and the ways to ask for it."""

    task: str
    words: Phrase
    wishes: tuple[str, ...] = ("{}",)


SETS: Mapping[str, Mapping[str, Skill]] = {
    "subjects": {
        "animals": Skill("reverse", ANIMALS),
        "foods": Skill("pirate", FOODS),
        "nature": Skill("double", NATURE),
        "things": Skill("rotate", THINGS),
    },
    "wishes": {
        "pirate": Skill("pirate", WORDS, ("like a pirate, please: {}", "say as a pirate: {}", "{} as a pirate")),
        "rally": Skill("rally", WORDS, ("cheer for these words: {}", "rally: {}", "{} and now cheer")),
        "rotate": Skill("rotate", WORDS, ("move the first word to the end: {}", "turn these: {}", "{} turned by one")),
        "double": Skill("double", WORDS, ("write each word twice: {}", "twice, please: {}", "{} each of them twice")),
    },
}
EXPERT_STEPS, EXPERT_RATE, ROUTER_STEPS = 400, 4e-3, 150
ROWS, PROMPTS, AT_ONCE, NEW = 1500, 100, 16, 48
SHARED = {"base": "seedling", "batch_size": 16, "schedule": "cosine", "warmup_steps": 10, "seed": 1}


def rows(name: str, skill: Skill, split: Split, count: int) -> list[Row]:
    """Distinct phrases with their wishes and answers."""
    rng = random.Random(f"{name}/{split}")
    phrases = distinct_phrases(rng, skill.words, split, count)
    return [row(rng.choice(skill.wishes), phrase, skill) for phrase in phrases]


def row(wish: str, phrase: Phrase, skill: Skill) -> Row:
    asked: Message = {"role": "user", "content": wish.format(" ".join(phrase))}
    return {"messages": [asked, {"role": "assistant", "content": TASKS[skill.task].answer(phrase)}]}


def teach(room: Path, hub: LocalHub, skills: Mapping[str, Skill]) -> None:
    """The four skills, then the router over them, each trained and pushed."""
    mixed = []
    for name, skill in skills.items():
        taught = rows(name, skill, "train", ROWS)
        learn(room, hub, name, taught, "lora", steps=EXPERT_STEPS, learning_rate=EXPERT_RATE, options={"rank": 8})
        mixed += taught
    random.Random(0).shuffle(mixed)
    learn(room, hub, "router", mixed, "lora-moe", steps=ROUTER_STEPS, options={"experts": list(skills)})


def learn(room: Path, hub: LocalHub, name: str, taught: Iterable[Row], method: str, **fields: Any) -> None:
    data = room / f"{name}.jsonl"
    write_jsonl(taught, data)
    recipe = parse_recipe({**SHARED, "eval_rows": 32, "method": method, "data": str(data), **fields}, name)
    result = train(recipe, room / name, workshop=Workshop(threads=1))
    print(f"{name}: {result.train_s:.0f} s, {result.metrics['eval_exact_match']:.2f} held out", flush=True)  # noqa: T201
    hub.push(room / name, name, base=find_base("seedling"))


async def ask(url: str, skills: Mapping[str, Skill], choose: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The share of right answers by skill; `choose` are the fields that choose the adapters for each."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(client: httpx.AsyncClient, name: str, row: Row) -> bool:
        question, answer = row["messages"]
        body = {"messages": [question], "max_tokens": NEW, "temperature": 0, **choose[name]}
        async with places:
            response = await client.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        return bool(response.json()["choices"][0]["message"]["content"] == answer["content"])

    shares = {}
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        for name, skill in skills.items():
            asked = rows(name, skill, "eval", PROMPTS)
            right = await asyncio.gather(*(one(client, name, row) for row in asked))
            shares[name] = sum(right) / len(right)
    return shares


def measure(room: Path, skills: Mapping[str, Skill]) -> dict[str, Any]:
    """One set, in a hub and a server of its own."""
    room.mkdir()
    os.environ["MULTIGRAFT_HOME"] = str(room / "home")
    teach(room, LocalHub(room / "home"), skills)
    arrow = {"routing": {"mode": "arrow", "candidates": list(skills)}}
    ways: dict[str, dict[str, Mapping[str, Any]]] = {
        "the right adapter": {name: {"model": name} for name in skills},
        "gate": {name: {"model": "router"} for name in skills},
        "arrow": dict.fromkeys(skills, arrow),
        "the bare base": {name: {} for name in skills},
    }
    with serving("seedling", room / "server.log") as url:
        shares = {way: asyncio.run(ask(url, skills, choose)) for way, choose in ways.items()}
    means = {way: sum(by_skill.values()) / len(by_skill) for way, by_skill in shares.items()}
    ratios = {way: mean / means["the right adapter"] for way, mean in means.items()}
    return {"right": shares, "mean": means, "ratio": ratios}


def run(room: Path, counts: Counts) -> Report:
    head = machine(SERVING)
    sets = {name: measure(room / name, skills) for name, skills in SETS.items()}
    return {"machine": head, "prompts_of_each": PROMPTS, "router_steps": ROUTER_STEPS, "sets": sets}


def table(report: Report) -> str:
    lines = []
    for name, found in report["sets"].items():
        skills = SETS[name]
        lines += [f"| {name}, chosen by | {' | '.join(skills)} | mean | of the right adapter's |"]
        lines += ["|---" * (len(skills) + 3) + "|"]
        for way, by_skill in found["right"].items():
            cells = " | ".join(f"{share:.2f}" for share in by_skill.values())
            lines.append(f"| {way} | {cells} | {found['mean'][way]:.3f} | {found['ratio'][way]:.3f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    command("routing", __doc__, {}, run, table)


if __name__ == "__main__":
    main()
