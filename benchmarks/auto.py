"""How often `model: auto` chooses right: eight skills of seedling, held-out prompts, several seeds.

    python -m benchmarks.auto [--seeds 5] [--out benchmarks/results]

Four skills are for phrases of one subject (three to five names of animals, of foods, ...), four for phrases that a user
asks to have transformed, in the many wordings of `trainer.seedling.steering`. Phrases to make centroids of and to ask
about are told apart by their digest. Small talk, alone and in conversations, is for the base. Centroids are of prompts
alone, so nothing is trained: prompts are embedded by the trainer's code and ranked by the server's. The same over HTTP,
with trained adapters, is tests/system/test_auto.py.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file

from benchmarks.machine import machine
from benchmarks.phrases import distinct_phrases
from benchmarks.report import SERVING, Counts, Report, command
from hub.centroids import embedding_layer
from hub.registry import LocalHub
from server.adapters.semantic import Candidate, Centroids, rank
from trainer.base import OpenBase, open_base
from trainer.centroids import embed, write_centroids
from trainer.recipe import parse_recipe
from trainer.seedling.smalltalk import Memory, small_talk
from trainer.seedling.steering import user_steering
from trainer.tasks import (
    ANIMALS,
    FOODS,
    NATURE,
    TASKS,
    THINGS,
    Message,
    Phrase,
    Row,
    Split,
    draw_phrase,
    exchange,
    write_jsonl,
)
from trainer.train import Workshop, train

BASE = "seedling"
TALKS: Mapping[str, tuple[int, ...]] = {"small talk": (1,), "conversations": (2, 3, 4)}  # turns
ROWS, ASKED, AT_ONCE = 400, 100, 16
SUBJECTS: Mapping[str, tuple[Phrase, str]] = {
    "animals": (ANIMALS, "reverse"),
    "foods": (FOODS, "shout"),
    "nature": (NATURE, "rotate"),
    "things": (THINGS, "double"),
}
WORDED = ("reverse", "shout", "echo", "last")


@dataclass(frozen=True)
class Answer:
    chosen: str | None
    text: str


def subject_rows(subject: str, split: Split, count: int, seed: int) -> list[Row]:
    """Bare phrases of one subject."""
    words, skill = SUBJECTS[subject]
    rng = random.Random(f"{subject}/{split}/{seed}")
    phrases = distinct_phrases(rng, words, split, count)
    return [exchange(phrase, TASKS[skill].answer(phrase)) for phrase in phrases]


def worded_rows(skill: str, split: Split, count: int, seed: int) -> list[Row]:
    """Phrases of any words, with the wish before them."""
    rng = random.Random(f"worded/{skill}/{split}/{seed}")
    rows = []
    for _ in range(count):
        phrase = draw_phrase(rng, split)
        asked: Message = {"role": "user", "content": user_steering(rng, skill, " ".join(phrase))}
        rows.append(Row(messages=[asked, {"role": "assistant", "content": TASKS[skill].answer(phrase)}]))
    return rows


def all_rows(split: Split, count: int, seed: int) -> dict[str, list[Row]]:
    rows = {subject: subject_rows(subject, split, count, seed) for subject in SUBJECTS}
    return rows | {f"say-{skill}": worded_rows(skill, split, count, seed) for skill in WORDED}


def conversations(turns: Sequence[int], count: int, seed: int) -> list[list[Message]]:
    """Small talk that ends with the user's turn."""
    rng = random.Random(f"talk/{turns}/{seed}")
    talks = []
    for _ in range(count):
        memory, messages = Memory(), list[Message]()
        for _ in range(rng.choice(turns)):
            asked, answer = small_talk(rng, memory)
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        talks.append(messages[:-1])
    return talks


def teach(name: str, rows: Sequence[Row], hub: LocalHub, room: Path, *, steps: int, seed: int) -> None:
    data = room / f"{name}.jsonl"
    write_jsonl(rows, data)
    fields = {"method": "lora", "base": BASE, "data": str(data), "steps": steps, "seed": seed, "eval_rows": 20}
    more = {"learning_rate": 0.004, "schedule": "cosine", "options": {"rank": 8}}
    out = room / name
    train(parse_recipe({**fields, **more}, name), out, workshop=Workshop(existing="overwrite", threads=1, device="cpu"))
    hub.push(out, name)


async def ask_all(url: str, model: str, prompts: Sequence[Sequence[Message]], *, tokens: int) -> list[Answer]:
    places = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:

        async def one(messages: Sequence[Message]) -> Answer:
            body = {"model": model, "messages": list(messages), "max_tokens": tokens, "temperature": 0}
            async with places:
                answer = (await http.post("/v1/chat/completions", json=body)).raise_for_status().json()
            return Answer(answer.get("routing", {}).get("chosen"), answer["choices"][0]["message"]["content"])

        return await asyncio.gather(*map(one, prompts))


def questions(rows: Iterable[Row]) -> list[list[Message]]:
    return [row["messages"][:-1] for row in rows]


def exact(answers: Sequence[Answer], rows: Sequence[Row]) -> float:
    return sum(a.text == row["messages"][-1]["content"] for a, row in zip(answers, rows, strict=True)) / len(rows)


def prompts_of(base: OpenBase, asked: Iterable[Sequence[Message]]) -> list[tuple[int, ...]]:
    """As they are served: the chat template's text, tokenized."""
    texts = [
        str(base.tokenizer.apply_chat_template(list(one), tokenize=False, add_generation_prompt=True)) for one in asked
    ]
    return [tuple(base.tokenizer.encode(text, add_special_tokens=False)) for text in texts]


def candidate(name: str, folder: Path) -> Candidate:
    said = json.loads((folder / "centroids.json").read_text())
    tensors = load_file(folder / "centroids.safetensors")
    return Candidate(name, Centroids(tensors["mean"], tensors["scale"], tensors["centroids"], said["threshold"]))


def choices(
    base: OpenBase, model: Any, candidates: Sequence[Candidate], asked: Iterable[Sequence[Message]]
) -> Counter[str | None]:
    """How often each candidate was chosen; None is the base."""
    layer = embedding_layer(model.config.num_hidden_layers)
    counted: Counter[str | None] = Counter()
    for embedding in embed(model, prompts_of(base, asked), layer, pad=base.pad).tolist():
        reached = [one.candidate.ref for one in rank(candidates, embedding, 0.0) if one.reached]
        counted[reached[0] if reached else None] += 1
    return counted


def measure(base: OpenBase, model: Any, room: Path, seed: int) -> dict[str, Any]:
    """The share of held-out prompts of each skill that chose it, and of small talk that was left to the base."""
    candidates = []
    for name, rows in all_rows("train", ROWS, seed).items():
        folder = room / f"{name}-{seed}"
        folder.mkdir()
        assert write_centroids(model, folder, base, prompts_of(base, questions(rows)), "chat")
        candidates.append(candidate(name, folder))
    asked = {name: questions(rows) for name, rows in all_rows("eval", ASKED, 1000 + seed).items()}
    asked |= {name: conversations(turns, 2 * ASKED, seed) for name, turns in TALKS.items()}
    report: dict[str, Any] = {"right": {}, "instead": {}}
    for name, messages in asked.items():
        counted = choices(base, model, candidates, messages)
        report["right"][name] = counted.pop(None if name in TALKS else name, 0) / len(messages)
        report["instead"][name] = {str(other): times for other, times in counted.items()}
    return report


def run(room: Path, counts: Counts) -> Report:
    torch.set_num_threads(1)
    base = open_base(BASE)
    model = base.load_weights(torch.device("cpu"))
    reports = [measure(base, model, room, seed) for seed in range(1, counts["seeds"] + 1)]
    return {"machine": machine(SERVING), "rows": ROWS, "asked": ASKED, "seeds": reports}


def table(report: Report) -> str:
    lines = [f"| prompts | right, seeds 1 to {len(report['seeds'])} |", "|---|---|"]
    for name in report["seeds"][0]["right"]:
        shares = ", ".join(f"{one['right'][name]:.3f}" for one in report["seeds"])
        lines.append(f"| {name} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    command("auto", __doc__, {"seeds": 5}, run, table)


if __name__ == "__main__":
    main()
